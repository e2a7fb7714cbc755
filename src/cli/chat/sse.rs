//! Server-sent events: bytes in, events out. Pure; follows the HTML standard's parser, without retry times.
//!
//! Invariant: memory is bounded by [`MAX_EVENT_BYTES`]. Tests: at the foot.

/// Largest event that is taken. A reply is far smaller; anything beyond is no Sophont node.
pub(super) const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Event {
    /// The last id the stream gave, with this event or before.
    pub id: Option<String>,
    /// Its name; `message` when the stream gives none.
    pub name: String,
    /// Its data lines.
    pub data: String,
}

/// The stream sent more than an event may have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {MAX_EVENT_BYTES} bytes")]
pub(super) struct TooLarge;

/// A stream that has been read up to some byte.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// Bytes of an unfinished line.
    line: Vec<u8>,
    /// Whether the last byte was a carriage return, whose line feed is still to be skipped.
    after_cr: bool,
    id: Option<String>,
    name: String,
    data: String,
}

impl Parser {
    /// Takes the next bytes and returns the events they finish.
    ///
    /// # Errors
    /// [`TooLarge`]; the stream cannot be read on.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Event>, TooLarge> {
        let mut events = Vec::new();
        for &byte in bytes {
            let skip = byte == b'\n' && self.after_cr;
            self.after_cr = byte == b'\r';
            match byte {
                _ if skip => {}
                b'\n' | b'\r' => {
                    let line = std::mem::take(&mut self.line);
                    events.extend(self.end_of_line(&String::from_utf8_lossy(&line)));
                }
                _ => self.line.push(byte),
            }
            if self.line.len() + self.data.len() > MAX_EVENT_BYTES {
                return Err(TooLarge);
            }
        }
        Ok(events)
    }

    fn end_of_line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
            let name = if name.is_empty() { String::from("message") } else { name };
            let data = data.strip_suffix('\n').map(str::to_owned)?;
            return Some(Event { id: self.id.clone(), name, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn event(id: Option<&str>, name: &str, data: &str) -> Event {
        Event { id: id.map(String::from), name: name.into(), data: data.into() }
    }

    #[test]
    fn events_are_read_however_the_bytes_are_cut() {
        let text =
            ": comment\nid: 1\nevent: token\ndata: {\"text\":\"hé\"}\n\nretry: 5\ndata: a\r\ndata:b\r\n\r\nid: 2\n\n";
        let expected = [event(Some("1"), "token", "{\"text\":\"hé\"}"), event(Some("1"), "message", "a\nb")];
        for size in 1..=text.len() {
            let mut parser = Parser::default();
            let events: Vec<_> = text.as_bytes().chunks(size).flat_map(|part| parser.feed(part).unwrap()).collect();
            assert_eq!(events, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = Parser::default();
        let part = vec![b'x'; 1024 * 1024];
        assert!((0..5).any(|_| parser.feed(&part) == Err(TooLarge)));
    }
}
