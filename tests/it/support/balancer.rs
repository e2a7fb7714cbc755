//! A balancer as simple as can be: TCP connections to the nodes behind it, one after the other.
//!
//! It works on the runtime that tests share, so a test that blocks does not stop it.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

use super::postgres;

/// Which balancers stand before which nodes, for figures that each node keeps for itself.
static ALL: Mutex<Vec<(SocketAddr, Behind)>> = Mutex::new(Vec::new());

type Behind = Arc<Mutex<Vec<SocketAddr>>>;

/// A balancer. Dropping it breaks its connections.
#[derive(Debug)]
pub struct Balancer {
    address: SocketAddr,
    behind: Behind,
    task: JoinHandle<()>,
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.task.abort();
        ALL.lock().unwrap_or_else(PoisonError::into_inner).retain(|(address, _)| *address != self.address);
    }
}

impl Balancer {
    /// Starts one with nobody behind it: it takes connections and closes them.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port for the balancer");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let address = listener.local_addr().expect("the balancer's address");
        let behind = Behind::default();
        ALL.lock().unwrap_or_else(PoisonError::into_inner).push((address, behind.clone()));
        let task = postgres::runtime().spawn(serve(listener, behind.clone()));
        Self { address, behind, task }
    }

    /// Where to knock.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on connections go to these.
    pub fn set(&self, nodes: Vec<SocketAddr>) {
        *self.behind.lock().unwrap_or_else(PoisonError::into_inner) = nodes;
    }
}

/// The nodes behind an address: itself, if no balancer listens there.
pub fn behind(address: SocketAddr) -> Vec<SocketAddr> {
    let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    let found = all.iter().find(|(balancer, _)| *balancer == address);
    found.map_or_else(|| vec![address], |(_, nodes)| nodes.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

async fn serve(listener: std::net::TcpListener, behind: Behind) {
    let listener = TcpListener::from_std(listener).expect("the balancer's listener");
    let mut connections = JoinSet::new();
    let turn = Arc::new(AtomicUsize::new(0));
    loop {
        tokio::select! {
            taken = listener.accept() => match taken {
                Ok((stream, _)) => {
                    let nodes = behind.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    connections.spawn(carry(stream, nodes, turn.fetch_add(1, Ordering::Relaxed)));
                }
                Err(error) => panic!("the balancer takes no connections: {error}"),
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// To the node whose turn it is, or the next that takes connections.
async fn carry(mut from: TcpStream, nodes: Vec<SocketAddr>, turn: usize) -> io::Result<()> {
    for at in 0..nodes.len() {
        let Ok(mut to) = TcpStream::connect(nodes[(turn + at) % nodes.len()]).await else { continue };
        from.set_nodelay(true)?;
        to.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut from, &mut to).await?;
        return Ok(());
    }
    Ok(())
}
