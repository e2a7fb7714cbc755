//! Lists of hosts that may be called, as an operator writes them. Pure. Tests: at the foot.

/// Whether an entry of a list covers a target: `host:port` that very port, `host` the usual port of the scheme. `given` is the
/// port that stands in the address, `port` the one that is meant.
pub fn covers(entry: &str, host: &str, given: Option<u16>, port: u16) -> bool {
    let entry = entry.trim();
    if entry.eq_ignore_ascii_case(host) {
        return given.is_none();
    }
    entry.rsplit_once(':').is_some_and(|(name, wanted)| {
        name.eq_ignore_ascii_case(host) && wanted.parse::<u16>().is_ok_and(|wanted| wanted == port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_covers_its_host_and_port() {
        assert!(covers("a.example", "A.example", None, 443));
        assert!(!covers("a.example", "a.example", Some(8443), 8443));
        assert!(covers("a.example:8443", "a.example", Some(8443), 8443));
        assert!(covers("[::1]:80", "[::1]", None, 80));
        assert!(!covers("example", "a.example", None, 443) && !covers("", "", Some(1), 1));
    }
}
