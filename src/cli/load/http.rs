//! Load over HTTP/1.1: connections that take the next due arrival, send, read, record.
//!
//! All connections of a thread share one schedule: an arrival goes to whichever connection is free, and when none is, it
//! waits and its latency counts the wait. Not here: pipelining (a browser or SDK does not do it either).

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{
    Error,
    drive::{Load, Orders, Pace, Plan},
    record::{Entry, Record},
    schedule::Schedule,
    wire::http::Connection,
};

/// Tries to connect again before a connection gives up for good.
const RECONNECTS: u32 = 3;
/// Pause between them.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);

/// What one connection sends.
pub trait Job {
    /// The next request's bytes; `None` when the work is done.
    fn next(&mut self) -> Option<&[u8]>;

    /// Takes the answer; whether it is one the scenario wants.
    fn answered(&mut self, status: u16, body: &[u8]) -> bool {
        let _ = body;
        (200..300).contains(&status)
    }

    /// Gives up the log it kept.
    fn take_log(&mut self) -> Vec<Entry> {
        Vec::new()
    }
}

/// Makes the job of a connection, by its number.
pub type MakeJob = dyn Fn(usize) -> Box<dyn Job> + Send + Sync;

async fn connect(load: &Load, number: usize) -> Result<Connection, Error> {
    let addr = load.addr(number)?;
    Connection::connect(addr).await.map_err(|error| Error::io(format!("connecting to {addr}"), error))
}

/// Runs one thread's connections to the end of the plan.
pub async fn run(mut orders: Orders, make: Arc<MakeJob>) -> Record {
    let mut connections = Vec::with_capacity(orders.connections.len());
    let mut standing = Ok(());
    for number in orders.connections.clone() {
        match connect(&orders.load, number).await {
            Ok(connection) => connections.push(connection),
            Err(error) => {
                standing = Err(error);
                break;
            }
        }
    }
    let Some(plan) = orders.begin(standing).await else { return Record::default() };
    let numbers = orders.connections.clone();
    let lane = Rc::new(Lane::new(orders, plan));
    let tasks: Vec<_> = numbers
        .zip(connections)
        .map(|(number, connection)| {
            let lane = lane.clone();
            tokio::task::spawn_local(lane.work(number, connection, make(number)))
        })
        .collect();
    let ticker = tokio::task::spawn_local(lane.clone().tick());
    for task in tasks {
        if let Err(error) = task.await {
            lane.record.borrow_mut().fail(error);
        }
    }
    ticker.abort();
    lane.count_unsent();
    lane.record.take()
}

/// What the connections of one thread share.
struct Lane {
    orders: Orders,
    plan: Plan,
    schedule: RefCell<Option<Schedule>>,
    record: RefCell<Record>,
    gate: Gate,
}

/// Connections waiting for their arrival to be due, earliest first.
#[derive(Default)]
struct Gate {
    waiting: RefCell<VecDeque<(Instant, Rc<Waiter>)>>,
    filled: Notify,
}

#[derive(Default)]
struct Waiter {
    released: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Gate {
    async fn until(&self, due: Instant) {
        if due <= Instant::now() {
            return;
        }
        let waiter = Rc::new(Waiter::default());
        self.waiting.borrow_mut().push_back((due, waiter.clone()));
        self.filled.notify_one();
        poll_fn(|context| {
            if waiter.released.get() {
                return Poll::Ready(());
            }
            *waiter.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Lets go whoever is due by now. Called after each answer too, because timers are only exact to the millisecond.
    fn release(&self, now: Instant) {
        let mut waiting = self.waiting.borrow_mut();
        while waiting.front().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, waiter)) = waiting.pop_front() {
                waiter.released.set(true);
                if let Some(waker) = waiter.waker.borrow_mut().take() {
                    waker.wake();
                }
            }
        }
    }

    fn head(&self) -> Option<Instant> {
        self.waiting.borrow().front().map(|(due, _)| *due)
    }
}

impl Lane {
    fn new(orders: Orders, plan: Plan) -> Self {
        let load = &orders.load;
        let schedule = match load.pace {
            Pace::Closed => None,
            Pace::Open { rate, arrivals } => {
                let threads = load.threads.clamp(1, load.connections.max(1));
                Some(Schedule::new(arrivals, rate, threads, orders.thread, load.seed))
            }
        };
        Self { orders, plan, schedule: RefCell::new(schedule), record: RefCell::default(), gate: Gate::default() }
    }

    /// Waits for a connection's turn: when the operation should begin. `None` = the run is over.
    async fn turn(&self) -> Option<Instant> {
        let over = |at: Instant| self.plan.window.to.is_some_and(|to| at >= to);
        let due = match self.schedule.borrow_mut().as_mut() {
            None => None,
            Some(schedule) => Some(self.plan.start + schedule.next()?),
        };
        let due = match due {
            None => {
                // Closed loop: now, but not before the start.
                self.gate.until(self.plan.start).await;
                Instant::now()
            }
            Some(due) if over(due) => return None,
            Some(due) => {
                self.gate.until(due).await;
                due
            }
        };
        let now = Instant::now();
        let stop = over(due) || now >= self.plan.give_up || self.orders.progress.stopped();
        if stop && !over(due) && self.plan.window.holds(due) && matches!(self.orders.load.pace, Pace::Open { .. }) {
            self.record.borrow_mut().unanswered += 1;
        }
        (!stop).then_some(due)
    }

    async fn work(self: Rc<Self>, number: usize, connection: Connection, mut job: Box<dyn Job>) {
        let mut connection = Some(connection);
        while let Some(due) = self.turn().await {
            if connection.is_none() {
                connection = self.connect_again(number).await;
            }
            let Some(open) = connection.as_mut() else { break };
            let Some(request) = job.next() else { break };
            let sent = Instant::now();
            let answer = tokio::time::timeout(self.orders.load.deadline, open.exchange(request)).await;
            let now = Instant::now();
            let keep = match answer {
                Err(_) => {
                    self.failed(due, io::ErrorKind::TimedOut.into());
                    false
                }
                Ok(Err(error)) => {
                    self.failed(due, error);
                    false
                }
                Ok(Ok(answer)) => {
                    let good = job.answered(answer.status, answer.body);
                    self.answered(due, sent, now, good, answer.status);
                    !answer.close
                }
            };
            if !keep {
                connection = None;
            }
            self.gate.release(now);
        }
        self.record.borrow_mut().log.append(&mut job.take_log());
    }

    async fn connect_again(&self, number: usize) -> Option<Connection> {
        for attempt in 0..RECONNECTS {
            if attempt > 0 {
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            if self.orders.progress.stopped() {
                return None;
            }
            match connect(&self.orders.load, number).await {
                Ok(connection) => return Some(connection),
                Err(error) => self.record.borrow_mut().fail(error),
            }
        }
        None
    }

    fn answered(&self, due: Instant, sent: Instant, now: Instant, good: bool, status: u16) {
        let counted = self.plan.window.holds(due);
        let progress = &self.orders.progress;
        if good {
            progress.done.fetch_add(1, Ordering::Relaxed);
            if counted {
                let mut record = self.record.borrow_mut();
                record.latency.add(now - due);
                record.lag.add(sent.saturating_duration_since(due));
            }
        } else {
            progress.bad.fetch_add(1, Ordering::Relaxed);
            if counted {
                *self.record.borrow_mut().refused.entry(status).or_default() += 1;
            }
        }
    }

    fn failed(&self, due: Instant, error: io::Error) {
        self.orders.progress.bad.fetch_add(1, Ordering::Relaxed);
        if self.plan.window.holds(due) {
            self.record.borrow_mut().fail(error);
        }
    }

    /// Arrivals of the window that no connection was free to take before the run was given up.
    fn count_unsent(&self) {
        let Some(to) = self.plan.window.to else { return };
        if self.orders.progress.stopped() {
            return;
        }
        if let Some(schedule) = self.schedule.borrow_mut().as_mut() {
            let left = schedule.map(|at| self.plan.start + at).take_while(|at| *at < to);
            let unsent = left.filter(|at| self.plan.window.holds(*at)).count();
            self.record.borrow_mut().unanswered += unsent as u64;
        }
    }

    /// Releases whoever is due; all of them when the run is stopped.
    async fn tick(self: Rc<Self>) {
        const LOOK: Duration = Duration::from_millis(100);
        loop {
            match self.gate.head() {
                None => self.gate.filled.notified().await,
                Some(due) => {
                    tokio::time::sleep_until(due.min(Instant::now() + LOOK).into()).await;
                    let all = Duration::from_secs(3600);
                    let now = Instant::now();
                    self.gate.release(if self.orders.progress.stopped() { now + all } else { now });
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_gate_lets_go_in_order_and_only_what_is_due() {
        let gate = Rc::new(Gate::default());
        let base = Instant::now() + Duration::from_secs(1000);
        let passed = Rc::new(RefCell::new(Vec::new()));
        let local = tokio::task::LocalSet::new();
        for n in 0..3 {
            let (gate, passed) = (gate.clone(), passed.clone());
            local.spawn_local(async move {
                gate.until(base + Duration::from_secs(n)).await;
                passed.borrow_mut().push(n);
            });
        }
        local
            .run_until(async {
                while gate.waiting.borrow().len() < 3 {
                    tokio::task::yield_now().await;
                }
                gate.release(base + Duration::from_secs(1));
                while passed.borrow().len() < 2 {
                    tokio::task::yield_now().await;
                }
                assert_eq!(gate.head(), Some(base + Duration::from_secs(2)));
                gate.until(Instant::now()).await; // what is due does not wait
            })
            .await;
        assert_eq!(*passed.borrow(), [0, 1]);
    }
}
