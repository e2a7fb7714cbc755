//! Server-sent events as the HTML standard defines them, from bytes in any portions.
//!
//! Not here: what the events mean (`client.rs`).
//! Invariants: the portions do not matter, only the bytes; a line or an event longer than [`MAX_SSE_BYTES`] ends the parsing
//! with an error instead of taking memory.
//! Tests: at the foot.

use crate::types::limits::MAX_SSE_BYTES;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Its type, empty for a plain message.
    pub(super) name: String,
    /// Its data, lines joined by `\n`.
    pub(super) data: String,
}

/// A line or an event is longer than allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stream has a line or event longer than {MAX_SSE_BYTES} bytes")]
pub(super) struct TooLong;

/// Takes bytes, yields events.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// The unfinished line.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed that follows belongs to it.
    after_return: bool,
    /// A line was seen, so no byte order mark can follow.
    begun: bool,
    name: String,
    data: String,
    /// Whether the event has any data line, even an empty one.
    has_data: bool,
}

impl Parser {
    /// Takes the next bytes and appends the events they complete.
    ///
    /// # Errors
    /// [`TooLong`]; the parser is of no use afterwards.
    pub(super) fn push(&mut self, mut bytes: &[u8], events: &mut Vec<Event>) -> Result<(), TooLong> {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_return) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                return self.grow(bytes);
            };
            self.grow(&bytes[..end])?;
            self.after_return = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            events.extend(self.take_line(&line)?);
            self.line = line;
            self.line.clear();
        }
        Ok(())
    }

    /// The stream ended: an event whose lines are complete counts although no blank line follows it. (The standard drops it;
    /// several servers end their last event so.)
    pub(super) fn finish(&mut self) -> Option<Event> {
        self.dispatch()
    }

    fn grow(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        if self.line.len() + bytes.len() > MAX_SSE_BYTES {
            return Err(TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn take_line(&mut self, line: &[u8]) -> Result<Option<Event>, TooLong> {
        let line = if std::mem::replace(&mut self.begun, true) {
            line
        } else {
            line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)
        };
        if line.is_empty() {
            return Ok(self.dispatch());
        }
        let text = String::from_utf8_lossy(line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if self.data.len() + value.len() + 1 > MAX_SSE_BYTES {
                    return Err(TooLong);
                }
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            "event" => value.clone_into(&mut self.name),
            // Comments (an empty field name), ids and retry times say nothing to us.
            _ => {}
        }
        Ok(None)
    }

    fn dispatch(&mut self) -> Option<Event> {
        let name = std::mem::take(&mut self.name);
        let data = std::mem::take(&mut self.data);
        std::mem::take(&mut self.has_data).then_some(Event { name, data })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(portions: &[&[u8]]) -> Result<Vec<Event>, TooLong> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        portions.iter().try_for_each(|portion| parser.push(portion, &mut events))?;
        events.extend(parser.finish());
        Ok(events)
    }

    fn data(text: &str) -> Vec<String> {
        parse(&[text.as_bytes()]).unwrap().into_iter().map(|event| event.data).collect()
    }

    #[test]
    fn the_standards_examples() {
        assert_eq!(data("data: YHOO\ndata: +2\ndata: 10\n\n"), ["YHOO\n+2\n10"]);
        assert_eq!(
            data(": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"),
            ["first event", "second event", " third event"]
        );
        assert_eq!(data("data\n\ndata\ndata\n\ndata:\n\n"), ["", "\n", ""]);
        assert_eq!(data("\u{feff}data: a\r\rdata: b\r\n\r\ndata: c"), ["a", "b"], "an unfinished line is dropped");
        assert_eq!(data("data: [DONE]\n"), ["[DONE]"], "a finished line counts at the end");
        let named = parse(&[b"event: error\ndata: {}\n\ndata: x\n\n"]).unwrap();
        assert_eq!(named.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["error", ""]);
    }

    #[test]
    fn lines_and_events_are_bounded() {
        let long = format!("data: {}", "x".repeat(MAX_SSE_BYTES));
        assert_eq!(parse(&[long.as_bytes()]), Err(TooLong));
        let line = format!("data: {}\n", "x".repeat(1000));
        assert_eq!(parse(&[line.repeat(MAX_SSE_BYTES / 1000 + 1).as_bytes()]), Err(TooLong));
        assert_eq!(
            parse(&[format!("{line}\n").repeat(1000).as_bytes()]).unwrap().len(),
            1000,
            "many events are no long one"
        );
        let mut parser = Parser::default();
        let endless = std::iter::repeat_n([b'x'; 1024], MAX_SSE_BYTES / 1024 + 1);
        assert!(endless.map(|portion| parser.push(&portion, &mut Vec::new())).any(|end| end.is_err()));
    }

    proptest! {
        #[test]
        fn the_portions_do_not_matter(
            text in "(data|event|id|x|)(:| |)[aé☃ ]{0,5}(\r\n|\n|\r|)|(data: [a-c]{0,3}(\r\n|\n|\r)){0,3}(\r\n|\n|\r){0,2}",
            more in proptest::collection::vec("(data: [é☃a]{0,3}|:|event: e|data)?(\r\n|\n|\r)", 0..12),
            cuts in proptest::collection::vec(0_usize..200, 0..12),
        ) {
            let bytes = (text + &more.concat()).into_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let portions: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let singles: Vec<&[u8]> = bytes.chunks(1).collect();
            let whole = parse(&[&bytes]);
            prop_assert_eq!(&parse(&portions), &whole);
            prop_assert_eq!(&parse(&singles), &whole);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(parse(&[&bytes]));
        }
    }
}
