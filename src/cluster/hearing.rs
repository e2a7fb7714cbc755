//! Who listens to answers at the doors of which node: the owner of the instance is told, because it is the one who can stop thinking.
//!
//! Not here: the registry itself (`instance::ears`), what an owner makes of it (`instance::actor`). What is told is a hint: a message that
//! is lost, and an owner that changes after somebody left, make a thought go on that nobody waits for, and the other way round only
//! when nobody at the owner's knows of one who listens elsewhere. Said since protocol 4, while all nodes speak it.
//! Tests: `tests/it/unheard.rs`.

use std::sync::Arc;

use super::{
    bus::{Message, message},
    forward::{Forwarder, Owner},
};
use crate::{
    instance::ears::{Ears, Neighbours},
    types::{InstanceKey, NodeId, StimulusId},
};

/// Whether all nodes know what is said.
type Understood = Box<dyn Fn() -> bool + Send + Sync>;

/// Listeners across nodes. Cheap to clone.
#[derive(Clone)]
pub struct Hearing(Arc<Inner>);

struct Inner {
    ears: Ears,
    forwarder: Forwarder,
    understood: Understood,
}

impl Hearing {
    /// Those of the registry, told over the forwarder's bus while `understood`.
    pub fn start(ears: &Ears, forwarder: &Forwarder, understood: Understood) -> Self {
        let hearing = Self(Arc::new(Inner { ears: ears.clone(), forwarder: forwarder.clone(), understood }));
        ears.set_neighbours(Arc::new(hearing.clone()));
        hearing
    }

    /// The table of owners changed: the new ones are told who listens here.
    pub fn moved(&self) {
        for (key, stimulus) in self.0.ears.here() {
            self.changed(&key, &stimulus, true, false);
        }
    }

    /// Takes a message about listeners; gives back any other.
    ///
    /// # Errors
    /// The message, when it is about something else.
    #[allow(clippy::result_large_err)] // it goes on to whoever wants it
    pub fn hear(&self, from: NodeId, message: Message) -> Result<(), Message> {
        match message {
            Message::Ear(message::Ear { key, stimulus, listens, left }) => {
                self.0.ears.elsewhere(from, key, stimulus, listens, left);
                Ok(())
            }
            other => Err(other),
        }
    }
}

impl Neighbours for Hearing {
    fn changed(&self, key: &InstanceKey, stimulus: &StimulusId, listens: bool, left: bool) -> bool {
        let Owner::Node { node, .. } = self.0.forwarder.owner_of(key) else { return false };
        if (self.0.understood)() {
            let ear = message::Ear { key: key.clone(), stimulus: stimulus.clone(), listens, left };
            self.0.forwarder.bus().hint(&node, &Message::Ear(ear));
        }
        true
    }
}
