//! What a connection has in flight inward, and what one refusal in it means for the rest.
//!
//! A 3.1.1 client is told no by a closed connection, and sends all of it again: all of it is one line. A client of MQTT 5 is
//! told for each publish and goes on, so there each instance has a line of its own, which is mended once its refusal was
//! answered: what comes later is a decision of the client's. Not here: what a line does (`instance::inbox`). Tests: at the foot.

use std::collections::HashMap;

use super::packet::Version;
use crate::{instance::inbox::Line, types::InstanceId};

/// The lines of a connection.
#[derive(Debug)]
pub struct Lines {
    /// Of all instances together.
    all: Option<Line>,
    /// Of each instance with something in flight, and how much.
    each: HashMap<InstanceId, (Line, usize), ahash::RandomState>,
}

impl Lines {
    /// Those of a new connection.
    pub fn new(version: Version) -> Self {
        Self { all: (version == Version::V3).then(Line::default), each: HashMap::default() }
    }

    /// The line for another publish to that instance.
    pub fn join(&mut self, instance: &InstanceId) -> Line {
        if let Some(line) = &self.all {
            return line.clone();
        }
        let (line, count) = self.each.entry(instance.clone()).or_default();
        *count += 1;
        line.clone()
    }

    /// A publish to that instance is answered.
    pub fn answered(&mut self, instance: &InstanceId) {
        let Some((line, count)) = self.each.get_mut(instance) else { return };
        *count -= 1;
        if *count == 0 {
            self.each.remove(instance);
        } else if line.is_broken() {
            // Those behind the refusal have the broken one.
            *line = Line::default();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::instance::{Error, Until, inbox::Waiter};

    fn instance(name: &str) -> InstanceId {
        InstanceId::new(name).unwrap()
    }

    fn refuse(line: &Line) {
        Waiter::new(Until::Accepted, Some(line.clone())).0.tell(Err(Error::InboxFull(1)));
    }

    #[test]
    fn with_mqtt_5_a_refusal_holds_up_those_in_flight_to_the_same_instance() {
        let mut lines = Lines::new(Version::V5);
        let (first, second, other) =
            (lines.join(&instance("a")), lines.join(&instance("a")), lines.join(&instance("b")));
        refuse(&first);
        assert!(second.is_broken() && lines.join(&instance("a")).is_broken() && !other.is_broken());
        lines.answered(&instance("a"));
        assert!(!lines.join(&instance("a")).is_broken(), "the client knows of the refusal, and sends on");
        (0..3).for_each(|_| lines.answered(&instance("a")));
        lines.answered(&instance("b"));
        assert!(lines.each.is_empty());
    }

    #[test]
    fn with_mqtt_3_a_refusal_is_the_end_of_all() {
        let mut lines = Lines::new(Version::V3);
        let (first, other) = (lines.join(&instance("a")), lines.join(&instance("b")));
        refuse(&first);
        lines.answered(&instance("a"));
        assert!(other.is_broken() && lines.join(&instance("c")).is_broken());
    }
}
