//! A bus that can be left unused: while it is shut, this node is a cluster of one and says nothing to anybody.
//!
//! The connection behind it stays, so that it can be opened while the node runs. Tests: at the foot.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;

use super::{Bus, Error, Health, Message};
use crate::types::NodeId;

/// A bus with a door.
pub struct Gate {
    bus: Arc<dyn Bus>,
    open: AtomicBool,
}

impl Gate {
    /// Before this bus.
    pub fn new(bus: Arc<dyn Bus>, open: bool) -> Self {
        Self { bus, open: AtomicBool::new(open) }
    }

    /// From here on it is so.
    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Release);
    }

    fn passage(&self) -> Result<&dyn Bus, Error> {
        if self.open.load(Ordering::Acquire) { Ok(&*self.bus) } else { Err(Error::Down) }
    }
}

#[async_trait]
impl Bus for Gate {
    fn node(&self) -> &NodeId {
        self.bus.node()
    }
    fn send(&self, to: &NodeId, message: &Message) -> Result<(), Error> {
        self.passage()?.send(to, message)
    }
    fn broadcast(&self, message: &Message) -> Result<(), Error> {
        self.passage()?.broadcast(message)
    }
    fn hint(&self, to: &NodeId, message: &Message) {
        if let Ok(bus) = self.passage() {
            bus.hint(to, message);
        }
    }
    fn health(&self) -> Health {
        self.passage().map_or(Health::Off, Bus::health)
    }
    async fn close(&self, patience: Duration) {
        self.bus.close(patience).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{cluster::bus::process::Network, types::Load};

    #[tokio::test]
    async fn a_shut_bus_says_nothing_and_an_opened_one_does() {
        let network = Network::default();
        let id = |name: &str| NodeId::new(format!("{name}.0")).unwrap();
        let (bus, _inlet) = network.join(id("a"));
        let (_other, mut hears) = network.join(id("b"));
        let gate = Gate::new(bus, false);
        let message = Message::Load(Load::default());
        assert_eq!(gate.broadcast(&message), Err(Error::Down));
        gate.hint(&id("b"), &message);
        assert_eq!(gate.health(), Health::Off);
        assert!(hears.try_next().is_none());
        gate.set_open(true);
        assert_eq!((gate.broadcast(&message), gate.health()), (Ok(()), Health::Up));
        assert!(hears.next().await.is_some());
    }
}
