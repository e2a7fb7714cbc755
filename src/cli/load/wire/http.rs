//! One HTTP/1.1 connection: write a prepared request, read one response, keep alive.
//!
//! Not here: pipelining, redirects, TLS. Cancel safety: after a dropped [`Connection::exchange`] the connection must be
//! dropped too. Tests: at the foot.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::template::Template;

/// Largest response taken; a page of turns with large payloads fits.
const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;
/// Most header lines of a response.
const MAX_HEADERS: usize = 64;

/// A request whose body has slots: `content-length` is computed once.
pub fn request(method: &str, path: &Template, host: SocketAddr, headers: &str, body: &Template) -> Template {
    let mut head = format!(" HTTP/1.1\r\nhost: {host}\r\n{headers}");
    if !body.is_empty() {
        head.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    Template::default().text(method).text(" ").template(path).text(head).template(body)
}

/// What a response says.
#[derive(Debug, PartialEq, Eq)]
pub struct Response<'a> {
    /// Status code.
    pub status: u16,
    /// The body, without chunk frames.
    pub body: &'a [u8],
    /// Whether the server closes the connection after it.
    pub close: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    head_len: usize,
    body: Body,
    close: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Length(usize),
    Chunked,
    UntilClose,
}

fn bad(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not an HTTP response: {what}"))
}

fn parse_head(bytes: &[u8]) -> io::Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head_len = match response.parse(bytes).map_err(bad)? {
        httparse::Status::Partial => return Ok(None),
        httparse::Status::Complete(n) => n,
    };
    let status = response.code.unwrap_or(0);
    let mut body = if status == 204 || status == 304 { Body::Length(0) } else { Body::UntilClose };
    let mut close = response.version == Some(0);
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(header.value).map_err(bad)?;
            body = Body::Length(text.trim().parse().map_err(bad)?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            body = Body::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") {
            close |= header.value.eq_ignore_ascii_case(b"close");
        }
    }
    Ok(Some(Head { status, head_len, body, close }))
}

/// Decodes chunks from `bytes` into `out`; how many bytes they took, or `None` when some are missing.
fn dechunk(bytes: &[u8], out: &mut Vec<u8>) -> io::Result<Option<usize>> {
    out.clear();
    let mut at = 0;
    loop {
        let (line, size) = match httparse::parse_chunk_size(&bytes[at..]).map_err(|_| bad("chunk size"))? {
            httparse::Status::Partial => return Ok(None),
            httparse::Status::Complete(parsed) => parsed,
        };
        let size = usize::try_from(size).map_err(bad)?;
        let from = at + line;
        if size > MAX_RESPONSE_BYTES || out.len() + size > MAX_RESPONSE_BYTES {
            return Err(bad("larger than the limit"));
        }
        let Some(chunk) = bytes.get(from..from + size) else { return Ok(None) };
        match bytes.get(from + size..from + size + 2) {
            None => return Ok(None),
            Some(b"\r\n") => {}
            Some(_) => return Err(bad("chunk without an end, or trailers")),
        }
        at = from + size + 2;
        if size == 0 {
            return Ok(Some(at));
        }
        out.extend_from_slice(chunk);
    }
}

/// A kept-alive connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    chunks: Vec<u8>,
}

impl Connection {
    /// Connects, with Nagle's algorithm off.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn connect(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096], filled: 0, chunks: Vec::new() })
    }

    /// Sends a request and reads its response. After an error the connection is of no use.
    ///
    /// # Errors
    /// What the socket says; `InvalidData` for a response that is none; `UnexpectedEof` when the server closed first.
    pub async fn exchange(&mut self, request: &[u8]) -> io::Result<Response<'_>> {
        self.filled = 0;
        self.stream.write_all(request).await?;
        let head = loop {
            self.fill().await?;
            if let Some(head) = parse_head(&self.buffer[..self.filled])? {
                break head;
            }
        };
        let (from, status, close) = (head.head_len, head.status, head.close);
        match head.body {
            Body::Length(length) => {
                if length > MAX_RESPONSE_BYTES {
                    return Err(bad("larger than the limit"));
                }
                let end = from + length;
                while self.filled < end {
                    self.fill().await?;
                }
                Ok(Response { status, body: &self.buffer[from..end], close })
            }
            Body::Chunked => {
                while dechunk(&self.buffer[from..self.filled], &mut self.chunks)?.is_none() {
                    self.fill().await?;
                }
                Ok(Response { status, body: &self.chunks, close })
            }
            Body::UntilClose => {
                while self.read_more().await? > 0 {}
                Ok(Response { status, body: &self.buffer[from..self.filled], close: true })
            }
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.read_more().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn read_more(&mut self) -> io::Result<usize> {
        if self.filled == self.buffer.len() {
            if self.filled >= MAX_RESPONSE_BYTES {
                return Err(bad("larger than the limit"));
            }
            self.buffer.resize(self.filled * 2, 0);
        }
        let n = self.stream.read(&mut self.buffer[self.filled..]).await?;
        self.filled += n;
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cli::load::wire::template::Slot;

    #[test]
    fn a_request_counts_its_body() {
        let path = Template::default().text("/v1/instances/i-").slot(Slot::Instance).text("/stimuli");
        let body = Template::default().text("{\"n\":").slot(Slot::Seq).text("}");
        let bytes = request("POST", &path, "127.0.0.1:80".parse().unwrap(), "", &body);
        let text = std::str::from_utf8(bytes.bytes()).unwrap();
        assert!(text.starts_with("POST /v1/instances/i-0000000/stimuli HTTP/1.1\r\nhost: 127.0.0.1:80\r\n"), "{text}");
        assert!(text.ends_with("content-length: 15\r\n\r\n{\"n\":000000000}"), "{text}");
        let empty = request("GET", &path, "127.0.0.1:80".parse().unwrap(), "x: y\r\n", &Template::default());
        assert!(empty.bytes().ends_with(b"host: 127.0.0.1:80\r\nx: y\r\n\r\n"));
    }

    #[test]
    fn heads_say_where_the_body_ends() {
        let head = parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").unwrap().unwrap();
        assert_eq!((head.status, head.body, head.close), (200, Body::Length(5), false));
        let head = parse_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
        let head = head.unwrap().unwrap();
        assert_eq!((head.body, head.close), (Body::Chunked, true));
        assert_eq!(parse_head(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap().body, Body::Length(0));
        assert_eq!(parse_head(b"HTTP/1.1 200 O").unwrap(), None);
        assert!(parse_head(b"\x00\x01garbage\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: minus\r\n\r\n").is_err());
    }

    #[test]
    fn chunks_are_joined() {
        let mut out = Vec::new();
        let bytes = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\nrest";
        assert_eq!(dechunk(bytes, &mut out).unwrap(), Some(bytes.len() - 4));
        assert_eq!(out, b"hello world");
        for cut in 0..bytes.len() - 4 {
            assert_eq!(dechunk(&bytes[..cut], &mut out).unwrap(), None, "cut at {cut}");
        }
        assert!(dechunk(b"5\r\nhelloXX", &mut out).is_err());
        assert!(dechunk(b"zz\r\n", &mut out).is_err());
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_a_closed_one_is_an_error() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 256];
            for part in [&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..], b"HTTP/1.1 429 X\r\nconte"] {
                let n = stream.read(&mut buffer).await.unwrap();
                assert_eq!(&buffer[..n], b"GET / HTTP/1.1\r\n\r\n");
                stream.write_all(part).await.unwrap();
            }
            stream.write_all(b"nt-length: 0\r\n\r\n").await.unwrap();
            let n = stream.read(&mut buffer).await.unwrap();
            assert!(n > 0);
        };
        let client = async {
            let mut connection = Connection::connect(addr).await.unwrap();
            let request = b"GET / HTTP/1.1\r\n\r\n";
            let first = connection.exchange(request).await.unwrap();
            assert_eq!(first, Response { status: 200, body: b"ok", close: false });
            assert_eq!(connection.exchange(request).await.unwrap().status, 429);
            assert!(connection.exchange(request).await.is_err());
        };
        tokio::join!(server, client);
    }
}
