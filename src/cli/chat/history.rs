//! Where lines typed into `chat` are kept between sessions: in the user's state folder, readable by nobody else.
//!
//! Tests: at the foot.

use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

/// Most lines kept.
pub(super) const MAX_LINES: usize = 1000;

/// `$XDG_STATE_HOME/sophont/chat_history`, else below `~/.local/state`; `None` without a home.
pub(super) fn file(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(state.join("sophont").join("chat_history"))
}

/// Makes the file, or makes sure that only its owner can read it: messages may be private.
///
/// # Errors
/// As the file system says.
pub(super) fn secure(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => restrict(path),
        Err(error) => Err(error),
    }
}

#[cfg(unix)]
fn restrict(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
}

#[cfg(not(unix))]
fn restrict(_path: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_file_lies_in_the_state_folder() {
        let home = |name: &str| (name == "HOME").then(|| OsString::from("/home/me"));
        assert_eq!(file(home).unwrap(), Path::new("/home/me/.local/state/sophont/chat_history"));
        let state = |name: &str| Some(OsString::from(if name == "HOME" { "/home/me" } else { "/state" }));
        assert_eq!(file(state).unwrap(), Path::new("/state/sophont/chat_history"));
        assert_eq!(file(|_| None), None);
    }

    #[test]
    fn only_the_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/chat_history");
        secure(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        secure(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
