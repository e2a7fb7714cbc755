//! `config check`, `config print`.

use std::process::ExitCode;

use super::{Failure, SettingsArgs, out};
use crate::config::live::LIVE;

/// `sophont config check`: `ok` and which settings change while a node runs, or everything that is wrong.
pub(super) fn check(args: &SettingsArgs) -> Result<ExitCode, Failure> {
    args.load()?;
    let mut answer = String::from("ok\nchange while a node runs, all others need a restart:\n");
    for key in LIVE {
        answer.push_str(&format!("  {}\n", key.name));
    }
    out::out(&answer);
    Ok(ExitCode::SUCCESS)
}

/// `sophont config print`: the settings in force.
pub(super) fn print(args: &SettingsArgs) -> Result<ExitCode, Failure> {
    let loaded = args.load()?;
    let file = loaded.file.as_ref().map_or_else(|| String::from("none"), |path| path.display().to_string());
    out::out(&format!("# Settings in force. File: {file}. Secrets are hidden.\n{}", loaded.print()));
    Ok(ExitCode::SUCCESS)
}
