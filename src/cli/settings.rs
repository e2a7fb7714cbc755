//! `config check`, `config print`.

use std::process::ExitCode;

use super::{Failure, SettingsArgs, out};

/// `sophont config check`: `ok`, or everything that is wrong.
pub(super) fn check(args: &SettingsArgs) -> Result<ExitCode, Failure> {
    args.load()?;
    out::out("ok\n");
    Ok(ExitCode::SUCCESS)
}

/// `sophont config print`: the settings in force.
pub(super) fn print(args: &SettingsArgs) -> Result<ExitCode, Failure> {
    let loaded = args.load()?;
    let file = loaded.file.as_ref().map_or_else(|| String::from("none"), |path| path.display().to_string());
    out::out(&format!("# Settings in force. File: {file}. Secrets are hidden.\n{}", loaded.print()));
    Ok(ExitCode::SUCCESS)
}
