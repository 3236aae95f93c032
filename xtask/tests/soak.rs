//! A little of the traffic that `cargo xtask soak` runs for an hour: four threads at once, no leak.

use std::process::Command;

#[test]
fn a_few_epochs_on_four_threads() {
    let soak = ["soak", "--epochs", "7", "--threads", "4"];
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(soak).output();
    let output = output.expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("7 epochs on 4 threads"), "{text}");
}
