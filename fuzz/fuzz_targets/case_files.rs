//! Case files: any bytes, parsed and run through the kernel that they name.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tensor_utils::testing::PeakAlloc;

#[path = "../../xtask/src"]
mod xtask {
    #[allow(dead_code, unused_imports)]
    pub(crate) mod cases;
}

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fuzz_target!(|bytes: &[u8]| {
    // There is no model in the folder, so cases of `qwen3` end with an error.
    let _ = xtask::cases::run_bytes(bytes, fuzz::folder());
});
