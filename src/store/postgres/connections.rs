//! Connections kept ready: a pool's places, and behind each a connection, made when it is first needed.
//!
//! Bounds and waiting are `scaling::pool`'s; deadpool keeps the connections, whose own bound cannot be made smaller while they
//! are in use. Invariants: a connection is handed out whole or not at all; one that is broken or too old is replaced; idle ones
//! beyond the pool's size are closed within seconds. Tests: `tests/it/store_postgres.rs`, `tests/it/settings.rs`.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use deadpool_postgres::{Object, Pool};

use super::{
    connect::{Failure, Target},
    no_connection,
};
use crate::{
    scaling::pool::{Limits, Place, Places, Refused},
    store::Error,
    telemetry::metric,
};

/// More than anybody configures: the places are the bound.
pub(super) const MOST: usize = 4096;
/// How often idle connections are looked at.
const TEND: Duration = Duration::from_secs(1);

/// A pool.
pub(super) struct Connections {
    pool: Pool,
    places: Arc<Places>,
}

/// A connection and its place.
pub(super) struct Held {
    pub(super) client: Object,
    pub(super) place: Place,
}

impl Connections {
    /// To this server, under this name.
    ///
    /// # Errors
    /// [`Error::Backend`].
    pub(super) fn new(target: &Target, name: &str, limits: Limits) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self { pool: target.pool(MOST)?, places: Places::new(name, limits) }))
    }

    /// A connection that is open as far as is known. Cancel safe.
    pub(super) async fn get(&self) -> Result<Held, Failure> {
        let recycle = self.places.limits().recycle;
        let place = self.places.take().await.map_err(|refused| match refused {
            Refused::Full => Failure::Refused(Error::Overloaded),
            // Not tried again: the wait was the caller's.
            Refused::Late => Failure::Refused(Error::Backend(String::from("all connections were busy for too long"))),
            Refused::Closed => Failure::Refused(Error::Closed),
        })?;
        loop {
            let client = self.pool.get().await.map_err(|e| no_connection(&e))?;
            if Object::metrics(&client).age() <= recycle {
                return Ok(Held { client, place });
            }
            drop(Object::take(client));
            recycled("age");
        }
    }

    /// The places, for figures and limits.
    pub(super) const fn places(&self) -> &Arc<Places> {
        &self.places
    }

    /// No connection from here on.
    pub(super) fn close(&self) {
        self.places.close();
        self.pool.close();
    }

    /// Closes idle connections that are broken, too old, or more than are kept.
    fn tend(&self) {
        let limits = self.places.limits();
        let mut kept = self.places.in_use();
        let mut broken = [("broken", 0_u64), ("age", 0), ("overflow", 0)];
        let retained = self.pool.retain(|client, metrics| {
            let faults = [client.is_closed(), metrics.age() > limits.recycle, kept >= limits.size];
            match faults.iter().position(|fault| *fault) {
                Some(fault) => broken[fault].1 += 1,
                None => kept += 1,
            }
            !faults.contains(&true)
        });
        drop(retained);
        for (reason, count) in broken {
            (0..count).for_each(|_| recycled(reason));
        }
    }
}

fn recycled(reason: &'static str) {
    metrics::counter!(metric::POOL_RECYCLED, "reason" => reason).increment(1);
}

/// Tends these until they are gone.
pub(super) async fn tend(all: Vec<Weak<Connections>>) {
    loop {
        tokio::time::sleep(TEND).await;
        let here: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        if here.is_empty() {
            return;
        }
        here.iter().for_each(|connections| connections.tend());
    }
}
