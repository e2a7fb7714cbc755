//! What the fuzzer throws at the tools: addresses a model wants fetched, and, in `mcp`, messages of servers.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use async_trait::async_trait;
use futures_util::FutureExt as _;

use super::fetch::{Fetch, Names};
use crate::config::tools::Fetching;

pub use super::mcp::fuzz::answers;

/// Leads each name to these.
struct Leads(Vec<IpAddr>);

#[async_trait]
impl Names for Leads {
    async fn find(&self, _: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(self.0.iter().map(|address| SocketAddr::new(*address, port)).collect())
    }
}

/// An address a model made up, on a node whose list lets its very host through, and a resolver that leads wherever the first 20 bytes
/// say: no connection goes to this machine or a private network.
pub fn addresses(bytes: &[u8]) {
    let Some((leads, url)) = bytes.split_at_checked(20) else { return };
    let Ok(url) = std::str::from_utf8(url) else { return };
    let v4 = Ipv4Addr::from(*leads.first_chunk::<4>().unwrap());
    let v6 = Ipv6Addr::from(*leads[4..].first_chunk::<16>().unwrap());
    let mut allow = vec![String::from("good.example")];
    if let Some(url) = plain_host(url.trim()) {
        allow.extend([url.clone(), format!("{url}:80"), format!("{url}:443"), format!("{url}:8080")]);
    }
    let settings = Fetching { allow, private: false, post: false, seconds: 5, max_kb: 4, max_concurrent: 2 };
    let names = Arc::new(Leads(vec![IpAddr::V4(v4), IpAddr::V6(v6)]));
    let fetch = Fetch::with_names(settings.clone(), 65_536, names.clone());
    let Ok(checked) = fetch.check(url) else { return };
    assert!(checked.username().is_empty() && checked.password().is_none() && checked.scheme().starts_with("http"));
    let host = checked.host_str().unwrap();
    assert!(
        settings.allow.iter().any(|allowed| allowed.starts_with(host) || allowed.eq_ignore_ascii_case(host)),
        "{host}"
    );
    // The resolver above answers at once.
    let found = fetch.addresses(&checked).now_or_never().unwrap();
    for address in found.map(|found| found.1).unwrap_or_default() {
        assert!(!is_inside(address.ip()), "{url} leads to {address}");
    }
}

/// What stands between `//` and the next of `/:?#`, the plainest reading there is.
fn plain_host(url: &str) -> Option<String> {
    let rest = url.split_once("//")?.1;
    let end = if rest.starts_with('[') {
        rest.find(']').map_or(rest.len(), |at| at + 1)
    } else {
        rest.find(['/', ':', '?', '#']).unwrap_or(rest.len())
    };
    Some(rest[..end].trim().to_ascii_lowercase())
}

/// Of this machine or a private network, by what the standard library knows, also where IPv6 has IPv4 in it.
fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_broadcast()
                || v4.is_multicast()
        }
        IpAddr::V6(v6) => {
            let [.., high, low] = v6.octets().as_chunks::<2>().0.to_vec()[..] else { return true };
            let last = Ipv4Addr::new(high[0], high[1], low[0], low[1]);
            let embedded = v6.to_ipv4().is_some() || v6.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_unique_local()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || (embedded && is_inside(IpAddr::V4(last)))
        }
    }
}
