//! Who may use which tool, and the two names of a server's tool. Pure. Tests: at the foot.
//!
//! A server's tool is `SERVER.TOOL` where people allow it, and `SERVER__TOOL` where a model is told of it: model servers take
//! no dots.

use crate::{
    config::tools::{is_pattern, is_server},
    types::ToolSpec,
};

const BETWEEN: &str = "__";

/// Whether a tool may be used: the profile names it and the operator allows it. `name` as people write it.
pub fn may(named: &[String], allowed: &[String], name: &str) -> bool {
    let covers = |patterns: &[String]| patterns.iter().any(|pattern| is_covered(pattern, name));
    covers(named) && covers(allowed)
}

/// Whether any tool of a server may be used, as far as is known without asking it.
pub fn may_some(named: &[String], allowed: &[String], server: &str) -> bool {
    let of_server =
        |patterns: &[String]| patterns.iter().any(|pattern| pattern.split_once('.').is_some_and(|(s, _)| s == server));
    of_server(named) && of_server(allowed)
}

fn is_covered(pattern: &str, name: &str) -> bool {
    if pattern == name {
        return true;
    }
    let server = pattern.strip_suffix(".*");
    server.is_some_and(|server| name.split_once('.').is_some_and(|(of, _)| of == server))
}

/// A tool's name as people write it; `None` when it is none. `offered` is as a model was told.
pub fn permission_of(offered: &str) -> Option<String> {
    if !ToolSpec::is_name(offered) {
        return None;
    }
    match offered.split_once(BETWEEN) {
        Some((server, tool)) if is_server(server) && !tool.is_empty() => Some(format!("{server}.{tool}")),
        _ => Some(offered.to_owned()),
    }
}

/// A server's tool as a model is told; `None` when its name does not fit.
pub fn offered_of(server: &str, tool: &str) -> Option<String> {
    let name = format!("{server}{BETWEEN}{tool}");
    (is_server(server) && !tool.is_empty() && ToolSpec::is_name(&name)).then_some(name)
}

/// Checks what a profile names.
///
/// # Errors
/// In words, which entry is none.
pub fn check(named: &[String]) -> Result<(), String> {
    match named.iter().position(|text| !is_pattern(text)) {
        None => Ok(()),
        Some(index) => Err(format!(
            "tools[{index}]: '{}' is no tool: there are {}, SERVER.TOOL and SERVER.*",
            named[index].chars().take(80).collect::<String>(),
            crate::config::tools::BUILT_IN.join(", ")
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn both_have_to_say_yes() {
        let (named, allowed) = (list(&["recall", "time.*", "files.read"]), list(&["recall", "time.now", "files.*"]));
        for name in ["recall", "time.now", "files.read"] {
            assert!(may(&named, &allowed, name), "{name}");
        }
        for name in ["remember", "time.set", "files.write", "times.now", "time"] {
            assert!(!may(&named, &allowed, name), "{name}");
        }
        assert!(!may(&[], &allowed, "recall") && !may(&named, &[], "recall"));
        assert!(may_some(&named, &allowed, "time") && !may_some(&named, &allowed, "tim"));
    }

    #[test]
    fn names_lead_there_and_back() {
        assert_eq!(offered_of("my-files", "read_file").as_deref(), Some("my-files__read_file"));
        assert_eq!(permission_of("my-files__read_file").as_deref(), Some("my-files.read_file"));
        assert_eq!(permission_of("set_state").as_deref(), Some("set_state"));
        assert_eq!(offered_of("time", "get.time"), None);
        assert_eq!(offered_of("time", &"x".repeat(60)), None);
        assert_eq!(permission_of("a.b"), None);
    }

    #[test]
    fn a_profile_names_tools() {
        assert!(check(&list(&["recall", "time.*"])).is_ok());
        let refused = check(&list(&["recall", "recal"])).unwrap_err();
        assert!(refused.starts_with("tools[1]: 'recal' is no tool: there are recall, remember,"), "{refused}");
    }

    proptest::proptest! {
        /// No name a model makes up leads to a tool that was not allowed.
        #[test]
        fn a_made_up_name_gets_nowhere(name in ".{0,80}") {
            let (named, allowed) = (list(&["recall", "time.*"]), list(&["recall", "remember", "time.now"]));
            if let Some(permission) = permission_of(&name) {
                let good = may(&named, &allowed, &permission);
                proptest::prop_assert_eq!(good, name == "recall" || name == "time__now", "{}", name);
            }
        }
    }
}
