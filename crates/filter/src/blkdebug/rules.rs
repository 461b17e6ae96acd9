//! Which request fails: the rules and the state they move through. Pure.
//!
//! An event arms the rules that wait for it in the present state; if any does, those armed before are
//! disarmed. A request fails by the first armed rule that fits it. The state changes after an event has
//! armed, by the first change that fits.

use blockmirror_block::ByteRange;

use super::event::{Event, IoType};
use super::options::{InjectError, SetState};

const SECTOR: u64 = 512;

/// The rules of a node.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    inject: Vec<InjectError>,
    set: Vec<SetState>,
    state: i32,
    /// Indexes into `inject`.
    armed: Vec<usize>,
    /// For each of `inject` whether it has done all it was to do.
    spent: Vec<bool>,
}

impl Rules {
    pub(super) fn new(inject: Vec<InjectError>, set: Vec<SetState>) -> Self {
        let spent = vec![false; inject.len()];
        let mut rules = Self { inject, set, state: 1, armed: Vec::new(), spent };
        rules.happens(Event::None);
        rules
    }

    /// Whether no rule can ever do anything.
    pub(super) fn is_empty(&self) -> bool {
        self.inject.is_empty()
    }

    pub(super) fn happens(&mut self, event: Event) {
        if event == Event::Elsewhere {
            return;
        }
        let state = self.state;
        let fits = |wanted: Option<i32>| wanted.is_none_or(|wanted| wanted == 0 || wanted == state);
        let newly: Vec<usize> = (0..self.inject.len())
            .filter(|i| self.inject[*i].event == event && !self.spent[*i] && fits(self.inject[*i].state))
            .collect();
        if !newly.is_empty() {
            self.armed = newly;
        }
        if let Some(change) = self.set.iter().find(|set| set.event == event && fits(set.state)) {
            self.state = change.new_state;
        }
    }

    /// The error a request fails with, if it does. A flush has no range.
    pub(super) fn verdict(&mut self, io: IoType, range: Option<ByteRange>) -> Option<i32> {
        let fits = |rule: &InjectError| {
            let kind = rule.iotype.map_or(io != IoType::BlockStatus, |kind| kind == io);
            let place = rule.sector.is_none_or(|sector| {
                let at = sector.checked_mul(SECTOR);
                range.zip(at).is_some_and(|(range, at)| range.contains(at))
            });
            kind && place
        };
        let position = self.armed.iter().position(|i| fits(&self.inject[*i]))?;
        let index = self.armed[position];
        let rule = &self.inject[index];
        if rule.errno == 0 {
            return None;
        }
        if rule.once {
            self.spent[index] = true;
            self.armed.remove(position);
        }
        Some(rule.errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rules: &mut Rules, sector: u64) -> Option<i32> {
        rules.happens(Event::ReadAio);
        rules.verdict(IoType::Read, Some(ByteRange::at(sector * SECTOR, SECTOR)))
    }

    #[test]
    fn an_event_that_arms_disarms_what_was_armed() {
        let always = InjectError { sector: Some(100), ..InjectError::new(Event::None) };
        let on_read = InjectError { sector: Some(200), errno: 28, ..InjectError::new(Event::ReadAio) };
        let mut rules = Rules::new(vec![always.clone(), on_read], Vec::new());
        // As QEMU does: the read that would have failed arms the other rule instead.
        assert_eq!(read(&mut rules, 100), None);
        assert_eq!(read(&mut rules, 200), Some(28));
        let mut rules = Rules::new(vec![always], Vec::new());
        assert_eq!(read(&mut rules, 99), None);
        assert_eq!(read(&mut rules, 100), Some(5));
    }

    #[test]
    fn states_change_after_an_event_has_armed() {
        let rule = InjectError { state: Some(2), once: true, ..InjectError::new(Event::ReadAio) };
        let set = SetState { event: Event::ReadAio, state: Some(1), new_state: 2 };
        let mut rules = Rules::new(vec![rule], vec![set]);
        assert_eq!(read(&mut rules, 0), None);
        assert_eq!(read(&mut rules, 0), Some(5));
        assert_eq!(read(&mut rules, 0), None, "once");
    }

    #[test]
    fn an_armed_rule_waits_for_its_kind_of_request() {
        let rule = InjectError { iotype: Some(IoType::Write), ..InjectError::new(Event::ReadAio) };
        let mut rules = Rules::new(vec![rule], Vec::new());
        let all = Some(ByteRange::new(0, 1 << 20));
        assert_eq!(rules.verdict(IoType::Write, all), None);
        assert_eq!(read(&mut rules, 0), None);
        assert_eq!(rules.verdict(IoType::Write, all), Some(5));
        assert_eq!(rules.verdict(IoType::Flush, None), None);
    }

    #[test]
    fn queries_of_extents_fail_only_by_name_and_flushes_have_no_sector() {
        let any = InjectError::new(Event::None);
        let mut rules = Rules::new(vec![any.clone()], Vec::new());
        assert_eq!(rules.verdict(IoType::BlockStatus, Some(ByteRange::at(0, 1))), None);
        assert_eq!(rules.verdict(IoType::Flush, None), Some(5));
        let mut rules = Rules::new(vec![InjectError { sector: Some(0), ..any.clone() }], Vec::new());
        assert_eq!(rules.verdict(IoType::Flush, None), None);
        let named = InjectError { iotype: Some(IoType::BlockStatus), ..any };
        let mut rules = Rules::new(vec![named], Vec::new());
        assert_eq!(rules.verdict(IoType::BlockStatus, Some(ByteRange::at(0, 1))), Some(5));
    }
}
