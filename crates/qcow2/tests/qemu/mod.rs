//! QEMU's tools as the oracle of tests. Without them the tests that need them say so and pass, unless
//! `BLOCKMIRROR_REQUIRE_QEMU=1`.

#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Whether `qemu-img` can be run; says on stderr when a test is skipped for lack of it.
pub(crate) fn available(test: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success()) {
        return true;
    }
    assert!(
        std::env::var_os("BLOCKMIRROR_REQUIRE_QEMU").is_none_or(|v| v != "1"),
        "{test}: qemu-img is required, but cannot be run"
    );
    eprintln!("SKIPPED {test}: qemu-img cannot be run");
    false
}

fn run(tool: &str, dir: &Path, args: &[&str]) -> Output {
    Command::new(tool).current_dir(dir).args(args).output().unwrap()
}

/// Runs `qemu-img` in `dir`; its output, or its complaint.
pub(crate) fn img(dir: &Path, args: &[&str]) -> Result<String, String> {
    let out = run("qemu-img", dir, args);
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
    }
}

/// Runs `qemu-io` commands on an image in `dir`.
pub(crate) fn io(dir: &Path, image: &str, commands: &[&str]) -> Result<String, String> {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    let out = run("qemu-io", dir, &args);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() { Ok(text) } else { Err(text) }
}

/// `qemu-img info` as JSON.
pub(crate) fn info(dir: &Path, image: &str) -> Value {
    let text = img(dir, &["info", "-f", "qcow2", "--output=json", image]).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Asserts that `qemu-img check` finds nothing wrong, leaks included.
pub(crate) fn assert_clean(dir: &Path, image: &str, what: &str) {
    if let Err(text) = img(dir, &["check", "-f", "qcow2", image]) {
        panic!("{what}: {text}");
    }
}
