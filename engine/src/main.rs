//! The `pageferry` command.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(pageferry::cli::main())
}
