//! Rules from a file in the form QEMU reads: groups `[inject-error]` and `[set-state]`, each with lines `key
//! = "value"`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::event::{Event, IoType};
use super::options::{BlkdebugError, BlkdebugOptions, InjectError, SetState};

/// The longest file that is read.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

type Result<T> = std::result::Result<T, BlkdebugError>;

fn error(line: usize, why: impl std::fmt::Display) -> BlkdebugError {
    BlkdebugError::Config(format!("line {line}: {why}"))
}

/// One group: its kind, where it begins, and its keys with the lines they stand in.
struct Group<'a> {
    kind: &'a str,
    line: usize,
    keys: Vec<(&'a str, &'a str, usize)>,
}

impl<'a> Group<'a> {
    /// The value of `key`, parsed; of several the last counts.
    fn get<T>(&self, key: &str, parse: impl FnOnce(&'a str) -> Option<T>) -> Result<Option<T>> {
        match self.keys.iter().rfind(|(name, ..)| *name == key) {
            None => Ok(None),
            Some((_, value, line)) => {
                let parsed = parse(value);
                parsed.map(Some).ok_or_else(|| error(*line, format!("{key} cannot be '{value}'")))
            }
        }
    }

    fn check_keys(&self, allowed: &[&str]) -> Result<()> {
        match self.keys.iter().find(|(name, ..)| !allowed.contains(name)) {
            Some((name, _, line)) => Err(error(*line, format!("Invalid parameter '{name}'"))),
            None => Ok(()),
        }
    }

    fn event(&self) -> Result<Event> {
        self.get("event", Event::from_name)?.ok_or_else(|| error(self.line, "Missing event name for rule"))
    }
}

fn number<T: TryFrom<u64>>(text: &str) -> Option<T> {
    let value = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    value.ok().and_then(|value| T::try_from(value).ok())
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

impl BlkdebugOptions {
    /// Adds the rules of the file at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, is longer than [`MAX_CONFIG_BYTES`], or is not one of rules.
    pub fn read_config(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let mut text = String::new();
        let file = File::open(path).map_err(BlkdebugError::Read)?;
        file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text).map_err(BlkdebugError::Read)?;
        self.parse_config(&text)
    }

    /// Adds the rules that `text` holds.
    ///
    /// # Errors
    /// Text that is not one of rules, each with its line; more than [`MAX_CONFIG_BYTES`].
    pub fn parse_config(&mut self, text: &str) -> Result<()> {
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(BlkdebugError::Config(format!("the file is longer than {MAX_CONFIG_BYTES} bytes")));
        }
        for group in groups(text)? {
            match group.kind {
                "inject-error" => self.inject_error.push(inject_error(&group)?),
                "set-state" => self.set_state.push(set_state(&group)?),
                other => return Err(error(group.line, format!("There is no option group '{other}'"))),
            }
        }
        Ok(())
    }
}

fn groups(text: &str) -> Result<Vec<Group<'_>>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for (index, raw) in text.lines().enumerate() {
        let (line, content) = (index + 1, raw.trim());
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if let Some(header) = content.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            // A group may carry a name of its own, which says nothing.
            let kind = header.split_once(' ').map_or(header, |(kind, _)| kind);
            groups.push(Group { kind, line, keys: Vec::new() });
            continue;
        }
        let value = content
            .split_once('=')
            .and_then(|(key, value)| Some((key.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?)));
        let Some((key, value)) = value else { return Err(error(line, "expected key = \"value\"")) };
        let Some(group) = groups.last_mut() else { return Err(error(line, "no group defined")) };
        group.keys.push((key, value, line));
    }
    Ok(groups)
}

fn inject_error(group: &Group<'_>) -> Result<InjectError> {
    group.check_keys(&["event", "state", "iotype", "errno", "sector", "once", "immediately"])?;
    Ok(InjectError {
        event: group.event()?,
        state: group.get("state", number)?,
        iotype: group.get("iotype", IoType::from_name)?,
        errno: group.get("errno", number)?.unwrap_or(5),
        sector: group.get("sector", number)?,
        once: group.get("once", switch)?.unwrap_or(false),
        immediately: group.get("immediately", switch)?.unwrap_or(false),
    })
}

fn set_state(group: &Group<'_>) -> Result<SetState> {
    group.check_keys(&["event", "state", "new_state"])?;
    Ok(SetState {
        event: group.event()?,
        state: group.get("state", number)?,
        new_state: group.get("new_state", number)?.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> std::result::Result<BlkdebugOptions, String> {
        let mut options = BlkdebugOptions::default();
        options.parse_config(text).map_err(|e| e.to_string())?;
        Ok(options)
    }

    #[test]
    fn groups_become_rules() {
        let options = parse(
            "# story\n[inject-error \"first\"]\n  event = \"read_aio\"\nerrno=\"28\"\nsector = \
             \"0x10\"\nonce = \"on\"\n\
             iotype = \"read\"\n\n[set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n",
        )
        .unwrap();
        let rule = InjectError {
            iotype: Some(IoType::Read),
            errno: 28,
            sector: Some(16),
            once: true,
            ..InjectError::new(Event::ReadAio)
        };
        assert_eq!(options.inject_error, [rule]);
        assert_eq!(options.set_state, [SetState { event: Event::WriteAio, state: Some(1), new_state: 2 }]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, why) in [
            ("[inject-error]\nevent = \"foo\"", "line 2: event cannot be 'foo'"),
            ("\n[foo]\n", "line 2: There is no option group 'foo'"),
            ("[set-state]\nerrno = \"5\"", "line 2: Invalid parameter 'errno'"),
            ("event = \"read_aio\"", "line 1: no group defined"),
            ("[inject-error]\nevent = read_aio", "line 2: expected key = \"value\""),
            ("[inject-error]\nstate = \"1\"", "line 1: Missing event name for rule"),
            ("[inject-error]\nevent = \"none\"\nonce = \"maybe\"", "line 3: once cannot be 'maybe'"),
            ("[inject-error]\nevent = \"none\"\nerrno = \"-5\"", "line 3: errno cannot be '-5'"),
        ] {
            assert_eq!(parse(text).unwrap_err(), why);
        }
        assert!(parse(&"#".repeat(2 << 20)).is_err());
    }
}
