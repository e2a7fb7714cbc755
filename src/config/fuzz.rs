//! What the fuzzer throws at the settings: files and texts of `--set`.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.

use super::{Config, Error, Sources, load};

/// A file: settings that print as TOML, or what is wrong.
pub fn files(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = std::env::temp_dir().join(format!("sophont-fuzz-{}.toml", std::process::id()));
    if std::fs::write(&path, text).is_err() {
        return;
    }
    let sets = text.lines().take(4).map(str::to_owned).collect();
    let sources = [Sources { file: Some(path), ..Sources::default() }, Sources { set: sets, ..Sources::default() }];
    for sources in &sources {
        match load(sources) {
            Ok(loaded) => {
                let printed = loaded.print();
                let again = toml::from_str::<Config>(&printed);
                assert!(again.is_ok(), "{again:?} in\n{printed}");
            }
            Err(Error::Problems(problems)) => assert!(!problems.is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
