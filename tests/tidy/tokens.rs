//! Rust source as tokens: enough to find paths, modules and string literals without being fooled by comments and strings.
//!
//! Not a parser: it knows words, `::`, single marks and literals, each with its line.

/// A piece of source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An identifier or keyword.
    Word(String),
    /// A string literal, without quotes, escapes as written.
    Text(String),
    /// `::`
    Path,
    /// Any other mark.
    Mark(char),
}

/// A piece of source and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What.
    pub kind: Kind,
    /// The line, from 1.
    pub line: usize,
}

impl Token {
    /// Whether it is this word.
    pub fn is(&self, word: &str) -> bool {
        matches!(&self.kind, Kind::Word(own) if own == word)
    }

    /// Its word.
    pub fn word(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }
}

/// Splits source into tokens, without comments, numbers' details or whitespace.
pub fn tokens(source: &str) -> Vec<Token> {
    let mut reader = Reader { rest: source, line: 1, tokens: Vec::new() };
    while reader.step() {}
    reader.tokens
}

struct Reader<'a> {
    rest: &'a str,
    line: usize,
    tokens: Vec<Token>,
}

impl Reader<'_> {
    fn step(&mut self) -> bool {
        let Some(first) = self.rest.chars().next() else { return false };
        if self.rest.starts_with("//") {
            self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
        } else if self.rest.starts_with("/*") {
            self.skip(block_comment(self.rest));
        } else if let Some((start, end, whole)) = string_literal(self.rest) {
            let text = self.rest[start..end].to_string();
            self.push(Kind::Text(text), whole);
        } else if first == '\'' {
            self.skip(quote(self.rest));
        } else if first.is_alphanumeric() || first == '_' {
            let end = self.rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest.len());
            let word = self.rest[..end].to_string();
            self.push(Kind::Word(word), end);
        } else if self.rest.starts_with("::") {
            self.push(Kind::Path, 2);
        } else if first.is_whitespace() {
            self.skip(first.len_utf8());
        } else {
            self.push(Kind::Mark(first), first.len_utf8());
        }
        true
    }

    fn push(&mut self, kind: Kind, length: usize) {
        self.tokens.push(Token { kind, line: self.line });
        self.skip(length);
    }

    fn skip(&mut self, length: usize) {
        self.line += self.rest[..length].matches('\n').count();
        self.rest = &self.rest[length..];
    }
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let tail = &rest[at..];
        if tail.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if tail.starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                break;
            }
        } else {
            at += tail.chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// Start and end of the content, and the whole length, when a string literal of any kind begins here.
fn string_literal(rest: &str) -> Option<(usize, usize, usize)> {
    let body = rest.trim_start_matches(['b', 'c', 'r']);
    let prefix = rest.len() - body.len();
    if prefix > 2 {
        return None;
    }
    if rest[..prefix].contains('r') {
        let hashes = body.len() - body.trim_start_matches('#').len();
        let start = prefix + hashes + 1;
        rest[prefix + hashes..].starts_with('"').then_some(())?;
        let closing = format!("\"{}", "#".repeat(hashes));
        let end = rest[start..].find(&closing).map_or(rest.len(), |at| start + at);
        return Some((start, end, (end + closing.len()).min(rest.len())));
    }
    body.starts_with('"').then_some(())?;
    let start = prefix + 1;
    let mut escaped = false;
    for (at, c) in rest[start..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some((start, start + at, start + at + 1)),
            _ => {}
        }
    }
    Some((start, rest.len(), rest.len()))
}

/// Length of a character literal, or of the quote alone when it begins a lifetime.
fn quote(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => rest[3..].find('\'').map_or(rest.len(), |at| at + 4),
        Some((at, c)) if rest[at + c.len_utf8()..].starts_with('\'') => at + c.len_utf8() + 1,
        _ => 1,
    }
}

#[test]
fn comments_strings_and_lifetimes_do_not_fool_it() {
    let source = r####"// crate::a
/* crate::b /* "nested */ */ let x: &'static str = "crate::c \" d"; let c = '"'; let d = '\''; r#"raw "crate::e" "#; b"bytes";
crate::f"####;
    let all = tokens(source);
    let texts: Vec<_> =
        all.iter().filter_map(|t| if let Kind::Text(text) = &t.kind { Some(&**text) } else { None }).collect();
    assert_eq!(texts, [r#"crate::c \" d"#, r#"raw "crate::e" "#, "bytes"]);
    let crates: Vec<_> = all.iter().filter(|t| t.is("crate")).map(|t| t.line).collect();
    assert_eq!(crates, [3]);
}
