//! The `culvert` program.

use std::process::ExitCode;

/// Freed on the thread that allocated, as sessions are.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    culvert::cli::main()
}
