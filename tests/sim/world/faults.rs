//! What goes wrong, and how it ends.

use super::*;

impl World {
    pub(super) fn fault(&mut self) {
        if !self.rough() {
            return self.heal();
        }
        self.faults += 1;
        let at = self.random.index(self.nodes.len());
        let length = self.random.within(100..6_000);
        match self.random.within(0..100) {
            0..30 => self.crash(at, length),
            30..60 => self.nodes[at].paused_until = self.now + length,
            60..85 => self.nodes[at].cut_until = self.now + length,
            85..93 => self.lossy_until = self.now + length,
            _ => {
                let node = named(at, self.nodes[at].life);
                let _ = now(self.store.drain(&node));
            }
        }
        let next = self.random.within(200..2_000);
        self.after(next, Event::Fault);
    }

    pub(super) fn crash(&mut self, at: usize, length: u64) {
        let node = &mut self.nodes[at];
        if !node.up {
            return;
        }
        let id = named(at, node.life);
        node.up = false;
        // What it held goes with it, and nobody is told.
        node.homes.clear();
        node.pending.clear();
        node.asked.clear();
        // Mostly the store sees the connection end; the end of a whole machine it does not see.
        if self.random.percent(70) {
            let delay = self.random.within(1..100);
            self.after(delay, Event::NoticeCrash(id));
        }
        self.after(length, Event::Restart(at));
    }

    pub(super) fn restart(&mut self, at: usize) {
        if self.nodes[at].up {
            return;
        }
        let life = self.nodes[at].life + 1;
        self.nodes[at] = self.born(at, life);
        self.start(at);
    }

    /// From here on nothing goes wrong. A node that drains is replaced.
    pub(super) fn heal(&mut self) {
        self.lossy_until = 0;
        let view = now(self.store.view()).unwrap();
        for at in 0..self.nodes.len() {
            self.nodes[at].paused_until = self.now;
            self.nodes[at].cut_until = self.now;
            let me = named(at, self.nodes[at].life);
            if self.nodes[at].lease.is_draining() || view.nodes.iter().any(|row| row.node == me && row.draining) {
                self.crash(at, 1);
            }
            self.restart(at);
        }
    }
}
