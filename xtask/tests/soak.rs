//! A little of the traffic that `cargo xtask soak` runs for an hour: four threads at once, no leak.

use std::process::Command;

/// What it prints for wrong arguments, with which it does not begin.
fn message(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(arguments).output();
    let output = output.expect("the program runs");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn times_and_threads_are_in_their_range() {
    for minutes in ["-1", "0", "nan", "inf", "1e300", "ten"] {
        for command in ["soak", "fuzz"] {
            let text = message(&[command, &format!("--minutes={minutes}")]);
            assert!(text.contains("above 0 and at most 1000000"), "{text}");
        }
    }
    assert!(message(&["soak", "--threads", "0"]).contains("0 is not in 1.."));
}

/// What is in use is compared with what was after the first five epochs.
#[test]
fn too_few_epochs_to_compare_memory_are_refused() {
    for epochs in ["0", "1", "5", "many"] {
        let text = message(&["soak", "--epochs", epochs]);
        assert!(text.contains("--epochs") && text.contains("at least 6"), "{text}");
    }
    let soak = ["soak", "--minutes", "0.00001", "--threads", "1"];
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(soak).output();
    let output = output.expect("the program runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("more --minutes"), "{text}");
}

#[test]
fn a_few_epochs_on_four_threads() {
    let soak = ["soak", "--epochs", "7", "--threads", "4"];
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(soak).output();
    let output = output.expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("7 epochs on 4 threads"), "{text}");
}
