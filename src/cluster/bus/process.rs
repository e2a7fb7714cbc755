//! A bus within one process, for tests and simulation: messages are lost, doubled and held on demand.
//!
//! Every message goes through its wire form, so what passes here passes between processes. Nothing here knows time: what is
//! held is let go by a call. Tests: at the foot.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{
    Bus, Error, Health, Inbound, Inlet, Message,
    frame::{self, Header},
};
use crate::types::NodeId;

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// It arrives.
    Deliver,
    /// It is lost, and nobody is told.
    Drop,
    /// It arrives twice.
    Double,
    /// It waits until [`Network::release`]; what is sent after it overtakes it.
    Hold,
    /// The sender is refused: its bus is down.
    Refuse,
}

type Rule = Box<dyn FnMut(&NodeId, &NodeId, &Message) -> Course + Send>;

/// What connects the nodes of one process. Cheap to clone.
#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    nodes: BTreeMap<NodeId, mpsc::Sender<Inbound>>,
    rule: Option<Rule>,
    held: Vec<(NodeId, NodeId, Vec<u8>)>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    /// A node comes. One that comes again under the same id takes the place of the earlier.
    pub fn join(&self, node: NodeId) -> (Arc<dyn Bus>, Inlet) {
        let (sender, inlet) = Inlet::new();
        self.lock().nodes.insert(node.clone(), sender);
        (Arc::new(Link { network: self.clone(), node }), inlet)
    }

    /// A node goes. What is sent to it from now on is told as lost.
    pub fn leave(&self, node: &NodeId) {
        self.lock().nodes.remove(node);
    }

    /// From here on `rule` says what becomes of each message, given sender and receiver. It must not use the network.
    pub fn rule(&self, rule: impl FnMut(&NodeId, &NodeId, &Message) -> Course + Send + 'static) {
        self.lock().rule = Some(Box::new(rule));
    }

    /// From here on every message arrives.
    pub fn heal(&self) {
        self.lock().rule = None;
    }

    /// Lets go what is held, in the order it was sent. Returns how many.
    pub fn release(&self) -> usize {
        let mut inner = self.lock();
        let held = std::mem::take(&mut inner.held);
        let count = held.len();
        for (from, to, frame) in held {
            // Its sender was told long ago that it is on its way.
            let _ = inner.deliver(&from, &to, &frame);
        }
        count
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn pass(&mut self, from: &NodeId, to: &NodeId, message: &Message, frame: &[u8]) -> Result<(), Error> {
        let course = self.rule.as_mut().map_or(Course::Deliver, |rule| rule(from, to, message));
        match course {
            Course::Deliver => self.deliver(from, to, frame),
            Course::Double => self.deliver(from, to, frame).and_then(|()| self.deliver(from, to, frame)),
            Course::Drop => Ok(()),
            Course::Hold => {
                self.held.push((from.clone(), to.clone(), frame.to_vec()));
                Ok(())
            }
            Course::Refuse => Err(Error::Down),
        }
    }

    fn deliver(&mut self, from: &NodeId, to: &NodeId, bytes: &[u8]) -> Result<(), Error> {
        let Some(receiver) = self.nodes.get(to) else {
            if let Some(sender) = self.nodes.get(from) {
                let _ = sender.try_send(Inbound::Lost { to: Some(to.clone()) });
            }
            return Ok(());
        };
        let (Header { from, .. }, messages) = frame::open(bytes).map_err(|_| Error::Encoding)?;
        for message in messages {
            let message = message.map_err(|_| Error::Encoding)?;
            let inbound = Inbound::Message { from: from.clone(), age_ms: 0, message };
            receiver.try_send(inbound).map_err(|_| Error::Overloaded)?;
        }
        Ok(())
    }
}

/// One node's end.
struct Link {
    network: Network,
    node: NodeId,
}

impl Link {
    fn frame(&self, message: &Message) -> Result<Vec<u8>, Error> {
        let mut bytes = frame::begin(&Header { from: self.node.clone(), number: 0 })?;
        frame::push(&mut bytes, &frame::encode(message)?);
        Ok(bytes)
    }
}

#[async_trait]
impl Bus for Link {
    fn node(&self) -> &NodeId {
        &self.node
    }

    fn send(&self, to: &NodeId, message: &Message) -> Result<(), Error> {
        let bytes = self.frame(message)?;
        self.network.lock().pass(&self.node, to, message, &bytes)
    }

    fn broadcast(&self, message: &Message) -> Result<(), Error> {
        let bytes = self.frame(message)?;
        let mut inner = self.network.lock();
        let others: Vec<_> = inner.nodes.keys().filter(|node| **node != self.node).cloned().collect();
        others.iter().try_for_each(|to| inner.pass(&self.node, to, message, &bytes))
    }

    fn health(&self) -> Health {
        Health::Up
    }

    async fn close(&self, _: Duration) {
        self.network.leave(&self.node);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::Load;

    fn load(instances: u64) -> Message {
        Message::Load(Load { instances, ..Load::default() })
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    /// What arrived so far: the figures of load reports, and a zero for each loss.
    fn arrived(inlet: &mut Inlet) -> Vec<u64> {
        std::iter::from_fn(|| inlet.try_next())
            .map(|inbound| match inbound {
                Inbound::Message { message: Message::Load(load), .. } => load.instances,
                _ => 0,
            })
            .collect()
    }

    #[test]
    fn messages_arrive_in_order_and_broadcasts_at_all_others() {
        let network = Network::default();
        let ((a, mut at_a), (_b, mut at_b), (_c, mut at_c)) =
            (network.join(node("a")), network.join(node("b")), network.join(node("c")));
        for n in 1..=3 {
            a.send(&node("b"), &load(n)).unwrap();
        }
        a.broadcast(&load(9)).unwrap();
        assert_eq!((arrived(&mut at_a), arrived(&mut at_b), arrived(&mut at_c)), (vec![], vec![1, 2, 3, 9], vec![9]));
    }

    #[test]
    fn messages_are_lost_doubled_held_and_refused_on_demand() {
        let network = Network::default();
        let ((a, mut at_a), (_b, mut at_b)) = (network.join(node("a")), network.join(node("b")));
        let courses = [Course::Drop, Course::Double, Course::Hold, Course::Deliver, Course::Refuse];
        let mut next = courses.into_iter();
        network.rule(move |_, _, _| next.next().unwrap());
        let sent: Vec<_> = (1..=5).map(|n| a.send(&node("b"), &load(n))).collect();
        assert_eq!(sent, [Ok(()), Ok(()), Ok(()), Ok(()), Err(Error::Down)]);
        assert_eq!(arrived(&mut at_b), [2, 2, 4]);
        assert_eq!(network.release(), 1);
        assert_eq!(arrived(&mut at_b), [3]);

        network.heal();
        network.leave(&node("b"));
        assert_eq!(a.send(&node("b"), &load(6)), Ok(()));
        assert!(matches!(at_a.try_next(), Some(Inbound::Lost { to: Some(to) }) if to == node("b")));
    }

    #[test]
    fn a_reader_that_is_behind_is_an_overload() {
        let network = Network::default();
        let ((a, _), (_b, _at_b)) = (network.join(node("a")), network.join(node("b")));
        let sent: Vec<_> = (0..=super::super::INLET as u64).map(|n| a.send(&node("b"), &load(n))).collect();
        assert!(sent.ends_with(&[Ok(()), Err(Error::Overloaded)]));
    }
}
