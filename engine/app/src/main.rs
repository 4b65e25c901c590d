//! The `pageferry` command.

#![deny(clippy::print_stdout, clippy::print_stderr)]

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(pageferry::cli::main())
}
