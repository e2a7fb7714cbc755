//! A small TCP proxy between two who should talk: its connections can be cut, stalled, made one-way, and mended.
//!
//! Tests: at the foot.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::fault::Flow;

/// A proxy in front of one address. Dropping it breaks its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    flow: watch::Sender<Flow>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// Starts it; what it stands in front of need not be there yet.
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port for the proxy");
        let address = listener.local_addr().expect("the proxy's address");
        let (flow, watched) = watch::channel(Flow::Open);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    taken = listener.accept() => match taken {
                        Ok((stream, _)) => drop(connections.spawn(carry(stream, to, watched.clone()))),
                        Err(error) => panic!("the proxy takes no connections: {error}"),
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { address, flow, task }
    }

    /// Where to knock.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes how its connections behave, those that stand too.
    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

async fn carry(from: TcpStream, to: SocketAddr, mut flow: watch::Receiver<Flow>) -> io::Result<()> {
    // A connection through a stalled network is not made before it is mended.
    match flow.wait_for(|flow| *flow != Flow::Stalled).await.map(|flow| *flow) {
        Ok(Flow::Cut) | Err(_) => return Ok(()),
        Ok(_) => {}
    }
    let there = TcpStream::connect(to).await?;
    from.set_nodelay(true)?;
    there.set_nodelay(true)?;
    let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), there.into_split());
    let asked = pump(from_read, to_write, flow.clone(), |flow| matches!(flow, Flow::Open | Flow::Mute));
    let answered = pump(to_read, from_write, flow.clone(), |flow| matches!(flow, Flow::Open));
    tokio::select! {
        end = asked => end,
        end = answered => end,
        // Half a connection is none.
        _ = flow.wait_for(|flow| *flow == Flow::Cut) => Ok(()),
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut flow: watch::Receiver<Flow>,
    passes: fn(&Flow) -> bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 || flow.wait_for(passes).await.is_err() {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::support::{PATIENCE, wait_for};

    /// Answers each byte with itself.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        address
    }

    async fn says(stream: &mut TcpStream, byte: u8) -> io::Result<u8> {
        stream.write_all(&[byte]).await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn it_carries_cuts_stalls_and_mends() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(says(&mut stream, 1).await.unwrap(), 1);

        for flow in [Flow::Stalled, Flow::Mute] {
            proxy.set(flow);
            stream.write_all(&[2]).await.unwrap();
            let early = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
            assert!(early.is_err(), "{flow:?} lets answers through");
            proxy.set(Flow::Open);
            assert_eq!(stream.read_u8().await.unwrap(), 2, "{flow:?} loses what was on its way");
        }

        proxy.set(Flow::Cut);
        assert!(says(&mut stream, 3).await.is_err());
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(says(&mut stream, 3).await.is_err());
        proxy.set(Flow::Open);
        wait_for("the proxy carries again", PATIENCE, async || {
            let mut stream = TcpStream::connect(proxy.address()).await.ok()?;
            says(&mut stream, 4).await.ok().filter(|byte| *byte == 4)
        })
        .await;
    }
}
