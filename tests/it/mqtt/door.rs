//! The embedded broker in this process, on a runtime of its own that can be killed, with instances the test plays.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    time::Duration,
};

use sophont::{
    cluster::Router,
    config::{self, Sources},
    delivery::{self, Publisher},
    gateway::{
        auth::Authenticator,
        mqtt::embedded::{Broker, Inward, Listeners},
    },
    instance::{
        Error, Receipt, Until,
        inbox::{Line, Waiter},
    },
    runtime::{clock::Clock, drain::Drain},
    store::memory::MemoryStore,
    types::{InstanceKey, Stimulus},
};
use tokio::{runtime::Runtime, sync::oneshot::Receiver};

type Answer = Result<Receipt, Error>;

/// Instances played by the test: every stimulus is kept; it is answered at once, or when the test says so.
#[derive(Default)]
pub struct Played {
    /// What came, in order.
    pub came: Mutex<Vec<(InstanceKey, Stimulus)>>,
    /// Answers owed, in order, while holding.
    pub owed: Mutex<Vec<Option<Waiter>>>,
    /// Whether answers wait for the test.
    pub is_holding: bool,
    /// What every stimulus is refused with.
    pub refusal: Option<Error>,
    /// Where replies go out.
    pub broker: Mutex<Option<Arc<Broker>>>,
}

impl Played {
    /// How many came.
    pub fn count(&self) -> usize {
        self.came.lock().unwrap().len()
    }

    /// Answers one stimulus that waits.
    pub fn answer(&self, index: usize) {
        self.end(index, Ok(Receipt::Accepted { repeated: false }));
    }

    /// Ends the wait of one stimulus.
    pub fn end(&self, index: usize, end: Answer) {
        let waiter = self.owed.lock().unwrap()[index].take().expect("not answered yet");
        assert!(!waiter.is_gone(), "somebody waits for the answer");
        waiter.tell(end);
    }

    /// Which of those that wait must not be taken any more.
    pub fn behind_a_refusal(&self) -> Vec<usize> {
        let owed = self.owed.lock().unwrap();
        let behind = |waiter: &Option<Waiter>| waiter.as_ref().is_some_and(Waiter::is_behind_a_refusal);
        (0..).zip(owed.iter()).filter(|(_, waiter)| behind(waiter)).map(|(index, _)| index).collect()
    }

    /// `echo` answers what it is told, as an instance does: over delivery, after the commit.
    fn reply(&self, key: &InstanceKey, stimulus: &Stimulus) {
        let Some(broker) = self.broker.lock().unwrap().clone() else { return };
        let message = delivery::Message {
            tenant: key.tenant.clone(),
            topic: delivery::reply_topic(key, stimulus.reply_to.as_ref()),
            payload: format!("{{\"content\":{:?}}}", stimulus.content).into(),
            json: true,
            retain: false,
            correlation: stimulus.reply_to.as_ref().and_then(|to| to.correlation.clone()),
            effect_id: format!("{}/1-0", key.instance),
        };
        tokio::spawn(async move { broker.publish(message).await.expect("the reply is taken") });
    }
}

impl Inward for Played {
    fn submit(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        until: Until,
        line: Option<&Line>,
    ) -> Result<Receiver<Answer>, Error> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        if stimulus.channel.as_str() != Router::PATCH_CHANNEL && key.instance.as_str() == "echo" {
            self.reply(key, &stimulus);
        }
        self.came.lock().unwrap().push((key.clone(), stimulus));
        let (waiter, receiver) = Waiter::new(until, line.cloned());
        if self.is_holding {
            self.owed.lock().unwrap().push(Some(waiter));
        } else {
            waiter.tell(Ok(Receipt::Accepted { repeated: false }));
        }
        Ok(receiver)
    }
}

/// A broker that runs. Dropping it stops its runtime.
pub struct Door {
    runtime: Option<Runtime>,
    /// The broker.
    pub broker: Arc<Broker>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it listens with TLS, if it does.
    pub tls_address: Option<SocketAddr>,
    /// Its store.
    pub store: MemoryStore,
    /// Its instances.
    pub played: Arc<Played>,
    /// Its drain.
    pub drain: Drain,
}

impl Door {
    /// A broker on an empty store, with instances that answer at once and no login.
    pub fn open() -> Self {
        Self::with(MemoryStore::new(), Played::default(), &[])
    }

    /// A broker on a store, with these instances and settings (as `--set` takes them).
    pub fn with(store: MemoryStore, played: Played, set: &[&str]) -> Self {
        let sources = Sources { set: set.iter().map(|&line| line.into()).collect(), ..Sources::default() };
        Self::configured(store, played, sources)
    }

    /// A broker with settings of any source.
    pub fn configured(store: MemoryStore, played: Played, sources: Sources) -> Self {
        let config = config::load(&sources).unwrap_or_else(|error| panic!("{error}")).config;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let auth = Arc::new(Authenticator::new(&config.auth).unwrap());
        let (played, drain) = (Arc::new(played), Drain::default());
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners = Listeners { plain: Some(bind()), tls: config.mqtt.tls_listen.map(|_| bind()) };
        let address = listeners.plain.as_ref().unwrap().local_addr().unwrap();
        let tls_address = listeners.tls.as_ref().map(|listener| listener.local_addr().unwrap());
        let starting = Broker::start_with(
            played.clone(),
            Arc::new(store.clone()),
            auth,
            config.mqtt,
            Clock::System,
            drain.clone(),
            runtime.handle().clone(),
            listeners,
            None,
        );
        // The test has a runtime of its own; this one is entered from a thread that has none.
        let broker = std::thread::scope(|scope| scope.spawn(|| runtime.block_on(starting)).join().unwrap()).unwrap();
        *played.broker.lock().unwrap() = Some(broker.clone());
        Self { runtime: Some(runtime), broker, address, tls_address, store, played, drain }
    }

    /// The process dies: nothing is finished, nothing is said. The store keeps what was committed.
    pub fn kill(mut self) -> MemoryStore {
        self.played.broker.lock().unwrap().take();
        let runtime = self.runtime.take().unwrap();
        // From a thread that has no runtime of its own: there one may wait for the end.
        std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5))).join().unwrap();
        self.store.clone()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.played.broker.lock().unwrap().take();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
