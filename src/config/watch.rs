//! Whether the configuration file is another one than when it was last read.
//!
//! Looks at what the name leads to (device, inode, size, times), so that a file that is written anew, renamed into place or
//! reached through links that were switched is seen alike; `docs/adr/0015-live-settings.md` says why it looks and does not
//! listen. Not here: reading it (`load`), what changed (`live`).
//! Invariant: a file is not read while it changes: only when two looks in a row found the same.
//! Tests: at the foot; `tests/it/settings.rs`.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// A file as the file system tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of what the name leads to at present; none when it leads nowhere.
    fn of(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            written: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// What a look found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing new.
    Same,
    /// Another file, and it is still: it should be read.
    Changed,
    /// The file that was there is there no more. Told once.
    Gone,
}

/// A name that is looked at now and then.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    /// As it was when it was last read.
    read: Option<Stamp>,
    /// As it was at the last look.
    seen: Option<Stamp>,
}

impl Watch {
    /// From now on; to be made before the file is read for the first time.
    pub fn new(path: PathBuf) -> Self {
        let now = Stamp::of(&path);
        Self { path, read: now, seen: now }
    }

    /// The name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks. Asks the file system, which may take its time.
    pub fn look(&mut self) -> Look {
        self.judge(Stamp::of(&self.path))
    }

    fn judge(&mut self, now: Option<Stamp>) -> Look {
        let still = now == self.seen;
        self.seen = now;
        if !still || now == self.read {
            return Look::Same;
        }
        self.read = now;
        if now.is_some() { Look::Changed } else { Look::Gone }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_read_when_it_is_still_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, "a").unwrap();
        let mut watch = Watch::new(path.clone());
        assert_eq!(watch.look(), Look::Same);
        std::fs::write(&path, "").unwrap();
        assert_eq!(watch.look(), Look::Same, "it may still be written");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(watch.look(), Look::Same, "it is");
        assert_eq!((watch.look(), watch.look()), (Look::Changed, Look::Same));
        std::fs::remove_file(&path).unwrap();
        assert_eq!((watch.look(), watch.look(), watch.look()), (Look::Same, Look::Gone, Look::Same));
        std::fs::write(&path, "abc").unwrap();
        assert_eq!((watch.look(), watch.look()), (Look::Same, Look::Changed));
    }

    #[test]
    fn a_file_renamed_into_place_is_another_though_it_looks_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("c.toml"), folder.path().join("new"));
        std::fs::write(&path, "a").unwrap();
        let mut watch = Watch::new(path.clone());
        std::fs::write(&other, "b").unwrap();
        let at = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::File::options().write(true).open(&other).unwrap().set_modified(at).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!((watch.look(), watch.look()), (Look::Same, Look::Changed));
    }

    /// As Kubernetes renews a volume: the name leads through a link to a folder, and that link is replaced.
    #[test]
    fn a_link_that_is_switched_on_the_way_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for version in ["v1", "v2"] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("c.toml"), version).unwrap();
        }
        symlink("v1", at("..data")).unwrap();
        symlink("..data/c.toml", at("c.toml")).unwrap();
        let mut watch = Watch::new(at("c.toml"));
        assert_eq!((watch.look(), watch.look()), (Look::Same, Look::Same));
        symlink("v2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_eq!((watch.look(), watch.look()), (Look::Same, Look::Changed));
    }
}
