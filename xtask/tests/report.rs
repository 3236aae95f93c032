//! `cargo xtask report` with something missing.

use std::process::Command;

#[test]
fn what_is_not_there_is_noticed_before_anything_runs() {
    for option in ["--training", "--against"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        // Nothing can be checked or measured without cargo.
        let output = command.args(["report", option, "nowhere"]).env("CARGO", "no-cargo").output();
        let output = output.expect("the program runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("cannot read nowhere"), "{text}");
    }
}
