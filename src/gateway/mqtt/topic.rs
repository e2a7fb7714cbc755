//! Topic names and filters of MQTT, and the trie that finds who subscribed to a name.
//!
//! Owns: what a well-formed name and filter are, matching, [`Trie`]. Not here: what a topic of `sophont/` means
//! (`inbound`), sessions.
//!
//! Invariants: a name or filter that passed its check has at most [`MAX_TOPIC_LEVELS`] levels, which bounds every
//! recursion here; the trie agrees with [`matches()`]; a trie that lost all its entries holds no nodes.
//! Tests: at the foot, against a naive matcher.

use std::collections::HashMap;

use crate::types::limits::{MAX_TOPIC_BYTES, MAX_TOPIC_LEVELS};

/// Whether a text may be the topic name of a publish.
pub fn is_name(text: &str) -> bool {
    is_path(text) && !text.contains(['+', '#'])
}

/// Length, levels, and no NUL or other control character.
fn is_path(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= MAX_TOPIC_BYTES
        && text.bytes().filter(|&b| b == b'/').count() < MAX_TOPIC_LEVELS
        && !text.chars().any(char::is_control)
}

/// Whether a text is a well-formed filter, without a `$share` prefix: `+` fills a level, `#` is the whole last one.
pub fn is_filter(text: &str) -> bool {
    if !is_path(text) {
        return false;
    }
    let mut levels = text.split('/').peekable();
    while let Some(level) = levels.next() {
        let fine = match level {
            "+" => true,
            "#" => levels.peek().is_none(),
            other => !other.contains(['+', '#']),
        };
        if !fine {
            return false;
        }
    }
    true
}

/// A subscription's filter, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter<'a> {
    /// The group of a shared subscription.
    pub share: Option<&'a str>,
    /// What topic names are compared with.
    pub path: &'a str,
}

impl<'a> Filter<'a> {
    /// Takes a filter apart; `None` when it is malformed.
    pub fn parse(text: &'a str) -> Option<Self> {
        let filter = match text.strip_prefix("$share/") {
            None => Self { share: None, path: text },
            Some(rest) => {
                let (group, path) = rest.split_once('/')?;
                if group.is_empty() || !is_name(group) {
                    return None;
                }
                Self { share: Some(group), path }
            }
        };
        is_filter(filter.path).then_some(filter)
    }
}

/// Whether a filter selects a name. Wildcards in the first level do not select names that begin with `$`.
pub fn matches(filter: &str, name: &str) -> bool {
    if name.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut filter = filter.split('/');
    let mut name = name.split('/');
    loop {
        match (filter.next(), name.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
}

/// The part of a filter before its first wildcard: every name it selects begins with it.
pub fn literal_prefix(filter: &str) -> &str {
    match filter.find(['+', '#']) {
        None => filter,
        // `a/#` also selects `a`.
        Some(at) => filter[..at].strip_suffix('/').unwrap_or(&filter[..at]),
    }
}

/// Values under filters, found by name. `K` tells the values of one filter apart.
#[derive(Debug)]
pub struct Trie<K, V> {
    root: Node<K, V>,
    len: usize,
}

#[derive(Debug)]
struct Node<K, V> {
    /// `+` stands here like any other level: it cannot occur in a name.
    children: HashMap<Box<str>, Node<K, V>, ahash::RandomState>,
    here: Vec<(K, V)>,
    /// Under `#` at this level.
    rest: Vec<(K, V)>,
}

impl<K, V> Default for Node<K, V> {
    fn default() -> Self {
        Self { children: HashMap::default(), here: Vec::new(), rest: Vec::new() }
    }
}

impl<K, V> Default for Trie<K, V> {
    fn default() -> Self {
        Self { root: Node::default(), len: 0 }
    }
}

impl<K: PartialEq, V> Trie<K, V> {
    /// Puts a value under a filter and a key; the value that was there before is returned.
    pub fn insert(&mut self, filter: &str, key: K, value: V) -> Option<V> {
        let (path, is_rest) = split_rest(filter);
        let mut node = &mut self.root;
        for level in path.into_iter().flat_map(|path| path.split('/')) {
            node = node.children.entry(Box::from(level)).or_default();
        }
        let list = if is_rest { &mut node.rest } else { &mut node.here };
        match list.iter_mut().find(|(other, _)| *other == key) {
            Some((_, old)) => Some(std::mem::replace(old, value)),
            None => {
                list.push((key, value));
                self.len += 1;
                None
            }
        }
    }

    /// The value under a filter and a key, made if there is none.
    pub fn get_or_insert(&mut self, filter: &str, key: K, make: impl FnOnce() -> V) -> &mut V {
        let (path, is_rest) = split_rest(filter);
        let mut node = &mut self.root;
        for level in path.into_iter().flat_map(|path| path.split('/')) {
            node = node.children.entry(Box::from(level)).or_default();
        }
        let list = if is_rest { &mut node.rest } else { &mut node.here };
        let at = list.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
            list.push((key, make()));
            self.len += 1;
            list.len() - 1
        });
        &mut list[at].1
    }

    /// The value under a filter and a key.
    pub fn get_mut(&mut self, filter: &str, key: &K) -> Option<&mut V> {
        let (path, is_rest) = split_rest(filter);
        let mut node = &mut self.root;
        for level in path.into_iter().flat_map(|path| path.split('/')) {
            node = node.children.get_mut(level)?;
        }
        let list = if is_rest { &mut node.rest } else { &mut node.here };
        list.iter_mut().find(|(other, _)| other == key).map(|(_, value)| value)
    }

    /// Takes a value away.
    pub fn remove(&mut self, filter: &str, key: &K) -> Option<V> {
        let (path, is_rest) = split_rest(filter);
        let removed = remove(&mut self.root, path, is_rest, key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Shows each value whose filter selects the name.
    pub fn visit<'a>(&'a self, name: &str, mut see: impl FnMut(&'a V)) {
        visit(&self.root, Some(name), name.starts_with('$'), &mut see);
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A filter without its `#`, and whether it had one. `None` is the root.
fn split_rest(filter: &str) -> (Option<&str>, bool) {
    match filter.strip_suffix('#') {
        None => (Some(filter), false),
        Some("") => (None, true),
        Some(path) => (Some(path.strip_suffix('/').unwrap_or(path)), true),
    }
}

fn remove<K: PartialEq, V>(node: &mut Node<K, V>, path: Option<&str>, is_rest: bool, key: &K) -> Option<V> {
    let Some(path) = path else {
        let list = if is_rest { &mut node.rest } else { &mut node.here };
        let at = list.iter().position(|(other, _)| other == key)?;
        return Some(list.swap_remove(at).1);
    };
    let (level, next) = first_level(path);
    let child = node.children.get_mut(level)?;
    let removed = remove(child, next, is_rest, key);
    if child.children.is_empty() && child.here.is_empty() && child.rest.is_empty() {
        node.children.remove(level);
    }
    removed
}

fn visit<'a, K, V>(node: &'a Node<K, V>, name: Option<&str>, is_hidden: bool, see: &mut impl FnMut(&'a V)) {
    if !is_hidden {
        node.rest.iter().for_each(|(_, value)| see(value));
    }
    let Some(name) = name else {
        return node.here.iter().for_each(|(_, value)| see(value));
    };
    let (level, next) = first_level(name);
    if let Some(child) = node.children.get(level) {
        visit(child, next, false, see);
    }
    if !is_hidden && let Some(child) = node.children.get("+") {
        visit(child, next, false, see);
    }
}

fn first_level(path: &str) -> (&str, Option<&str>) {
    path.split_once('/').map_or((path, None), |(level, next)| (level, Some(next)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_and_filters_are_checked() {
        for good in ["a", "/", "a//b", "$SYS/x", "sophont/t/i/in/c", "é/ü"] {
            assert!(is_name(good) && is_filter(good), "{good:?}");
        }
        for bad in ["", "a\0b", "a\u{7}", &"x".repeat(MAX_TOPIC_BYTES + 1), &"/".repeat(MAX_TOPIC_LEVELS)] {
            assert!(!is_name(bad) && !is_filter(bad), "{bad:?}");
        }
        for wild in ["+", "#", "a/+/b", "a/#", "+/#"] {
            assert!(!is_name(wild) && is_filter(wild), "{wild:?}");
        }
        for bad in ["a+", "a/b#", "#/a", "a/#/b", "+a/b"] {
            assert!(!is_filter(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_shared_filter_has_a_group_and_a_path() {
        assert_eq!(Filter::parse("$share/g/a/#"), Some(Filter { share: Some("g"), path: "a/#" }));
        assert_eq!(Filter::parse("a/b"), Some(Filter { share: None, path: "a/b" }));
        for bad in ["$share/g", "$share//a", "$share/g+/a", "$share/g/", "$share/g/a#"] {
            assert_eq!(Filter::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn wildcards_select_as_the_specification_says() {
        for (filter, name, expected) in [
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("a/+", "a/b", true),
            ("a/+", "a", false),
            ("a/+", "a/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
        ] {
            assert_eq!(matches(filter, name), expected, "{filter} {name}");
        }
        assert_eq!(literal_prefix("a/b/#"), "a/b");
        assert_eq!(literal_prefix("a/b"), "a/b");
        assert_eq!(literal_prefix("#"), "");
        assert_eq!(literal_prefix("/+"), "");
    }

    fn level() -> impl Strategy<Value = String> {
        prop_oneof![Just(String::new()), Just("a".into()), Just("b".into()), Just("$s".into()), Just("+".into())]
    }

    fn filter() -> impl Strategy<Value = String> {
        (proptest::collection::vec(level(), 1..5), any::<bool>()).prop_map(|(mut levels, rest)| {
            if rest {
                levels.push("#".into());
            }
            levels.join("/")
        })
    }

    fn name() -> impl Strategy<Value = String> {
        proptest::collection::vec(level(), 1..6)
            .prop_map(|levels| levels.join("/").replace('+', "b"))
            .prop_filter("a name is not empty", |name| !name.is_empty())
    }

    proptest! {
        #[test]
        fn the_trie_agrees_with_the_naive_matcher(
            filters in proptest::collection::vec(filter().prop_filter("not empty", |f| !f.is_empty()), 0..12),
            dropped in proptest::collection::vec(any::<bool>(), 12),
            names in proptest::collection::vec(name(), 1..6),
        ) {
            let mut trie = Trie::default();
            for (key, filter) in filters.iter().enumerate() {
                trie.insert(filter, key, key);
            }
            for (key, filter) in filters.iter().enumerate() {
                if dropped[key] {
                    prop_assert_eq!(trie.remove(filter, &key), Some(key));
                    prop_assert_eq!(trie.remove(filter, &key), None);
                }
            }
            for name in &names {
                let mut found = Vec::new();
                trie.visit(name, |key| found.push(*key));
                found.sort_unstable();
                let expected: Vec<usize> = filters.iter().enumerate()
                    .filter(|(key, filter)| !dropped[*key] && matches(filter, name))
                    .map(|(key, _)| key).collect();
                prop_assert_eq!(found, expected, "{}", name);
            }
            for (key, filter) in filters.iter().enumerate() {
                trie.remove(filter, &key);
            }
            prop_assert!(trie.is_empty() && trie.root.children.is_empty());
        }

        #[test]
        fn every_name_a_filter_selects_begins_with_its_literal_prefix(filter in filter(), name in name()) {
            prop_assume!(is_filter(&filter));
            prop_assert!(!matches(&filter, &name) || name.starts_with(literal_prefix(&filter)));
        }

        #[test]
        fn no_text_is_too_hostile(text in ".{0,40}") {
            let _ = (is_name(&text), is_filter(&text), Filter::parse(&text), matches(&text, &text));
        }
    }
}
