//! Names of settings outside of files: `SOPHONT__SECTION__KEY` in the environment, `section.key=value` for `--set`.
//!
//! Tests: at the foot; layering in `load.rs`.

use super::tree::Tree;

/// What the environment variables of settings begin with.
pub const PREFIX: &str = "SOPHONT__";

/// Deepest path that is looked at; the deepest setting has four parts.
const MAX_DEPTH: usize = 8;

/// The path a variable names, in lower case; `None` when the variable is not one of ours.
///
/// # Errors
/// A sentence when it begins like one of ours and names nothing.
pub(super) fn path_of(variable: &str) -> Option<Result<Vec<String>, &'static str>> {
    let rest = variable.strip_prefix(PREFIX)?;
    let path: Vec<String> = rest.split("__").map(str::to_ascii_lowercase).collect();
    let bad = !(2..=MAX_DEPTH).contains(&path.len()) || path.iter().any(String::is_empty);
    Some(if bad { Err("names no setting, the form is SOPHONT__SECTION__KEY") } else { Ok(path) })
}

/// The same path with the names of free choice (providers) as they are written where they were first set: the
/// environment knows neither lower case nor dashes.
pub(super) fn as_written(path: Vec<String>, known: &Tree) -> Vec<String> {
    let mut out: Vec<String> = Vec::with_capacity(path.len());
    for name in path {
        let written = match known.at(&out) {
            Some(Tree::Table(table)) if !table.contains_key(&name) => {
                table.keys().find(|key| key.to_ascii_lowercase().replace('-', "_") == name).cloned()
            }
            _ => None,
        };
        out.push(written.unwrap_or(name));
    }
    out
}

/// Takes `section.key=value` apart. Names with dots in them stand in quotes, as in TOML.
///
/// # Errors
/// A sentence that says how it should look.
pub(super) fn split_set(text: &str) -> Result<(Vec<String>, String), &'static str> {
    const FORM: &str = "the form is --set section.key=value";
    let (key, value) = text.split_once('=').ok_or(FORM)?;
    let probe = format!("{} = 0", key.trim());
    let parsed = toml::de::DeTable::parse(&probe).map_err(|_| FORM)?;
    let mut tree = Tree::of_table(parsed.get_ref());
    let mut path = Vec::new();
    while let Tree::Table(table) = tree {
        if table.len() != 1 || path.len() == MAX_DEPTH {
            return Err(FORM);
        }
        let (name, below) = table.into_iter().next().ok_or(FORM)?;
        path.push(name);
        tree = below;
    }
    if path.len() < 2 { Err(FORM) } else { Ok((path, value.trim().to_owned())) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use toml::de::DeTable;

    use super::*;

    #[test]
    fn a_variable_names_a_path() {
        assert_eq!(path_of("SOPHONT__HTTP__MAX_BODY_KB").unwrap().unwrap(), ["http", "max_body_kb"]);
        assert_eq!(path_of("SOPHONT_HTTP"), None);
        assert!(path_of("SOPHONT__HTTP").unwrap().is_err());
        assert!(path_of("SOPHONT____X").unwrap().is_err());
    }

    #[test]
    fn names_of_free_choice_are_found_again() {
        let known = Tree::of_table(DeTable::parse("[cognition.providers.My-GPU]\nmodel = 'm'").unwrap().get_ref());
        let path = ["cognition", "providers", "my_gpu", "model"].map(String::from).to_vec();
        assert_eq!(as_written(path, &known), ["cognition", "providers", "My-GPU", "model"]);
    }

    #[test]
    fn a_set_is_taken_apart() {
        let (path, value) = split_set("cognition.providers.\"a.b\".base_url = http://x/?a=b").unwrap();
        assert_eq!(path, ["cognition", "providers", "a.b", "base_url"]);
        assert_eq!(value, "http://x/?a=b");
        for bad in ["http.listen", "listen=1", "=1", "a..b=1", "a.b=1\nc.d=2".split_once('=').unwrap().0] {
            assert!(split_set(bad).is_err(), "{bad}");
        }
    }
}
