//! Load over MQTT 5: devices that publish with QoS 1, many unacknowledged at once, and listen for the replies.
//!
//! Each device is one connection with its own schedule; it writes what is due in one go and reads what has come. Latency
//! counts from the intended start to the PUBACK, and in a second histogram to the reply on the topic.
//! Not here: reconnects. A lost connection is a failure, and the figures say so.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    super::check_history::log::{Door, What},
    Error,
    drive::{Orders, Pace, Plan},
    record::{Entry, Record},
    schedule::{Random, Schedule},
    wire::{
        mqtt::{self, Packet, Publish},
        template::{SEQ_DIGITS, Slot, Template, find, read_digits},
    },
};

/// Longest wait for CONNACK and SUBACK.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Filters in one SUBSCRIBE.
const FILTERS_PER_SUBSCRIBE: usize = 100;
/// A device looks at the clock and the stop flag at least this often.
const LOOK: Duration = Duration::from_millis(100);
/// Most bytes written in one go.
const MAX_WRITE_BYTES: usize = 64 * 1024;

/// The devices of a run.
#[derive(Debug, Clone)]
pub struct Devices {
    /// Devices in all: how many connections share the instances.
    pub count: usize,
    /// Instances in all; device `d` speaks for those with `number % count == d`.
    pub instances: u64,
    /// What is before an instance's number in its name.
    pub prefix: String,
    /// Tenant in the topics.
    pub tenant: String,
    /// User name and password, when the server wants them.
    pub login: Option<(String, String)>,
    /// Most unacknowledged publishes of a device.
    pub window: u16,
    /// Whether to subscribe to the replies, and with which QoS.
    pub replies: Option<u8>,
    /// Tells the stimulus ids of runs apart.
    pub nonce: String,
    /// Number of the first sender in ids.
    pub first_sender: u32,
    /// The message, with its slots.
    pub payload: Template,
    /// Whether to keep a log for the checker.
    pub log: bool,
}

impl Devices {
    fn topic(&self, part: &str) -> Template {
        let head = format!("sophont/{}/{}", self.tenant, self.prefix);
        Template::default().text(head).slot(Slot::Instance).text(part)
    }

    fn id(&self) -> Template {
        let id = Template::default().text(&self.nonce).text("-").slot(Slot::Sender).text("-");
        id.slot(Slot::Seq)
    }

    /// The topic filters of one device's replies.
    fn filters(&self, device: usize) -> Vec<String> {
        let mut topic = self.topic("/out/reply");
        let numbers = (device as u64..self.instances).step_by(self.count.max(1));
        numbers
            .map(|number| {
                topic.set(Slot::Instance, number);
                String::from_utf8_lossy(topic.bytes()).into_owned()
            })
            .collect()
    }

    /// An instance of this device, at random.
    fn pick(&self, device: usize, random: &mut Random) -> u64 {
        let (device, count) = (device as u64, self.count.max(1) as u64);
        let owned = self.instances.saturating_sub(device).div_ceil(count);
        device + count * random.below(owned)
    }
}

/// Runs one thread's devices to the end of the plan.
pub async fn run(mut orders: Orders, devices: Arc<Devices>) -> Record {
    let mut wires = Vec::with_capacity(orders.connections.len());
    let mut standing = Ok(());
    for number in orders.connections.clone() {
        match tokio::time::timeout(HANDSHAKE_DEADLINE, Wire::open(&orders, &devices, number)).await {
            Ok(Ok(wire)) => wires.push((number, wire)),
            Ok(Err(error)) => standing = Err(Error::io("connecting over MQTT", error)),
            Err(_) => standing = Err(Error::io("connecting over MQTT", io::ErrorKind::TimedOut.into())),
        }
        if standing.is_err() {
            break;
        }
    }
    let Some(plan) = orders.begin(standing).await else { return Record::default() };
    let record = Rc::new(RefCell::new(Record::default()));
    let tasks: Vec<_> = wires
        .into_iter()
        .map(|(number, wire)| {
            let device = Device::new(&orders, plan, devices.clone(), number, wire, record.clone());
            tokio::task::spawn_local(device.work())
        })
        .collect();
    for task in tasks {
        if let Err(error) = task.await {
            record.borrow_mut().fail(error);
        }
    }
    record.take()
}

/// A connection with its unread bytes.
struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    receive_maximum: u16,
}

fn refused(what: &str, reason: u8) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, format!("{what} refused with reason {reason:#04x}"))
}

impl Wire {
    async fn open(orders: &Orders, devices: &Devices, number: usize) -> io::Result<Self> {
        let stream = TcpStream::connect(orders.load.addr(number).map_err(io::Error::other)?).await?;
        stream.set_nodelay(true)?;
        let mut wire = Self { stream, buffer: vec![0; 16 * 1024], filled: 0, receive_maximum: u16::MAX };
        let client_id = format!("{}-{number}", devices.nonce);
        let login = devices.login.as_ref().map(|(name, password)| (name.as_str(), password.as_str()));
        wire.stream.write_all(&mqtt::connect(&client_id, login, 0)).await?;
        let (reason, maximum) = wire
            .await_packet(|packet| match packet {
                Packet::ConnAck { reason, receive_maximum } => Some((reason, receive_maximum)),
                _ => None,
            })
            .await?;
        if reason >= 0x80 {
            return Err(refused("connection", reason));
        }
        wire.receive_maximum = maximum.max(1);
        if let Some(qos) = devices.replies {
            wire.subscribe(&devices.filters(number), qos).await?;
        }
        Ok(wire)
    }

    async fn subscribe(&mut self, filters: &[String], qos: u8) -> io::Result<()> {
        for part in filters.chunks(FILTERS_PER_SUBSCRIBE) {
            self.stream.write_all(&mqtt::subscribe(1, part, qos)).await?;
            let worst = self
                .await_packet(|packet| match packet {
                    Packet::SubAck { reasons, .. } => Some(reasons.iter().copied().max().unwrap_or(0)),
                    _ => None,
                })
                .await?;
            if worst >= 0x80 {
                return Err(refused("subscription", worst));
            }
        }
        Ok(())
    }

    async fn await_packet<T>(&mut self, want: impl Fn(Packet<'_>) -> Option<T>) -> io::Result<T> {
        loop {
            let mut used = 0;
            let mut found = None;
            while let Some((packet, length)) = parse(&self.buffer[used..self.filled])? {
                used += length;
                if let Packet::Disconnect { reason } = packet {
                    return Err(refused("connection", reason));
                }
                found = want(packet);
                if found.is_some() {
                    break;
                }
            }
            self.consume(used);
            if let Some(found) = found {
                return Ok(found);
            }
            self.fill().await?;
        }
    }

    /// Reads once. Cancel safe: a dropped read took nothing.
    async fn fill(&mut self) -> io::Result<()> {
        if self.filled == self.buffer.len() {
            self.buffer.resize(self.filled * 2, 0); // bounded by the codec's largest packet
        }
        match self.stream.read(&mut self.buffer[self.filled..]).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.filled += n;
                Ok(())
            }
        }
    }

    fn consume(&mut self, used: usize) {
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
    }
}

fn parse(bytes: &[u8]) -> io::Result<Option<(Packet<'_>, usize)>> {
    mqtt::parse(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// A publish that is not acknowledged yet.
#[derive(Debug, Clone, Copy)]
struct Open {
    due: Instant,
    seq: u32,
    log_at: usize,
}

struct Device {
    plan: Plan,
    devices: Arc<Devices>,
    number: usize,
    progress: Arc<super::record::Progress>,
    wire: Wire,
    record: Rc<RefCell<Record>>,
    schedule: Option<Schedule>,
    random: Random,
    publish: Publish,
    id_head: Vec<u8>,
    out: Vec<u8>,
    /// By packet id - 1.
    open: Vec<Option<Open>>,
    free: Vec<u16>,
    seq: u32,
    /// Intended starts of publishes whose reply has not come, from `replies_base` on.
    awaited: VecDeque<Option<Instant>>,
    replies_base: u32,
    replies_due: usize,
    log: Vec<Entry>,
}

impl Device {
    fn new(
        orders: &Orders,
        plan: Plan,
        devices: Arc<Devices>,
        number: usize,
        wire: Wire,
        record: Rc<RefCell<Record>>,
    ) -> Self {
        let load = &orders.load;
        let schedule = match load.pace {
            Pace::Closed => None,
            Pace::Open { rate, arrivals } => {
                Some(Schedule::new(arrivals, rate, load.connections, number, load.seed ^ 0x4d51))
            }
        };
        let window = devices.window.min(wire.receive_maximum).max(1);
        let mut publish = Publish::new(&devices.topic("/in/load"), &devices.id(), &devices.payload);
        let sender = devices.first_sender + u32::try_from(number).unwrap_or(u32::MAX);
        publish.template().set(Slot::Sender, u64::from(sender));
        let mut id_head = devices.id();
        id_head.set(Slot::Sender, u64::from(sender));
        let id_head = id_head.bytes()[..id_head.len() - SEQ_DIGITS].to_vec();
        Self {
            plan,
            number,
            progress: orders.progress.clone(),
            wire,
            record,
            schedule,
            random: Random::new(load.seed, 0x1_0000 + number as u64),
            publish,
            id_head,
            out: Vec::with_capacity(16 * 1024),
            open: vec![None; usize::from(window)],
            free: (1..=window).rev().collect(),
            seq: 0,
            awaited: VecDeque::new(),
            replies_base: 1,
            replies_due: 0,
            log: Vec::new(),
            devices,
        }
    }

    async fn work(mut self) {
        if let Err(error) = self.exchange().await {
            self.progress.bad.fetch_add(1, Ordering::Relaxed);
            self.record.borrow_mut().fail(format!("device {}: {error}", self.number));
        }
        let _ = self.wire.stream.write_all(&mqtt::DISCONNECT).await;
        let stopped = self.progress.stopped();
        let window = self.plan.window;
        let mut record = self.record.borrow_mut();
        if !stopped {
            let waiting = self.open.iter().flatten().filter(|open| window.holds(open.due)).count();
            let missing = self.awaited.iter().flatten().filter(|due| window.holds(**due)).count();
            record.unanswered += waiting as u64;
            record.replies_missing += missing as u64;
        }
        record.log.append(&mut self.log);
    }

    async fn exchange(&mut self) -> io::Result<()> {
        let mut due = self.next_due();
        loop {
            let now = Instant::now();
            if now >= self.plan.give_up || self.progress.stopped() {
                self.count_unsent(due);
                return Ok(());
            }
            while let Some(at) = due.filter(|at| *at <= now)
                && self.out.len() < MAX_WRITE_BYTES
                && let Some(packet_id) = self.free.pop()
            {
                self.append(packet_id, at, now);
                due = self.next_due();
            }
            if !self.out.is_empty() {
                self.wire.stream.write_all(&self.out).await?;
                self.out.clear();
            }
            if due.is_none() && self.free.len() == self.open.len() && self.replies_due == 0 {
                return Ok(());
            }
            let look = now + LOOK;
            let wake = due.filter(|_| !self.free.is_empty()).map_or(look, |at| at.min(look));
            tokio::select! {
                biased;
                filled = self.wire.fill() => {
                    filled?;
                    self.read_packets()?;
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    /// When the next publish is due; `None` when the window is over.
    fn next_due(&mut self) -> Option<Instant> {
        let at = match self.schedule.as_mut() {
            // A closed loop is always due, until the window is over.
            None if self.plan.window.to.is_some_and(|to| Instant::now() >= to) => return None,
            None => self.plan.start,
            Some(schedule) => self.plan.start + schedule.next()?,
        };
        self.plan.window.to.is_none_or(|to| at < to).then_some(at)
    }

    fn append(&mut self, packet_id: u16, due: Instant, now: Instant) {
        // In a closed loop the clock starts now.
        let due = if self.schedule.is_some() { due } else { now };
        self.seq += 1;
        let instance = self.devices.pick(self.number, &mut self.random);
        self.publish.template().set(Slot::Instance, instance);
        self.publish.template().set(Slot::Seq, u64::from(self.seq));
        self.out.extend_from_slice(self.publish.bytes(packet_id));
        self.open[usize::from(packet_id) - 1] = Some(Open { due, seq: self.seq, log_at: self.log.len() });
        if self.devices.replies.is_some() {
            self.awaited.push_back(Some(due));
            self.replies_due += 1;
        }
        if self.devices.log {
            let sender = self.devices.first_sender + u32::try_from(self.number).unwrap_or(u32::MAX);
            let instance = u32::try_from(instance).unwrap_or(u32::MAX);
            self.log.push(Entry::new(instance, sender, self.seq, now, Door::Mqtt));
        }
        if self.plan.window.holds(due) {
            self.record.borrow_mut().lag.add(now.saturating_duration_since(due));
        }
    }

    fn read_packets(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let bytes = std::mem::take(&mut self.wire.buffer);
        let mut used = 0;
        let result = loop {
            match parse(&bytes[used..self.wire.filled]) {
                Ok(Some((packet, length))) => {
                    used += length;
                    if let Err(error) = self.take(packet, now) {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.wire.buffer = bytes;
        self.wire.consume(used);
        result
    }

    fn take(&mut self, packet: Packet<'_>, now: Instant) -> io::Result<()> {
        match packet {
            Packet::PubAck { packet_id, reason } => self.acknowledged(packet_id, reason, now),
            Packet::Publish { packet_id, payload, .. } => {
                if packet_id > 0 {
                    self.out.extend_from_slice(&mqtt::puback(packet_id));
                }
                self.replied(payload, now);
            }
            Packet::Disconnect { reason } => return Err(refused("connection", reason)),
            _ => {}
        }
        Ok(())
    }

    fn acknowledged(&mut self, packet_id: u16, reason: u8, now: Instant) {
        let place = usize::from(packet_id).checked_sub(1).and_then(|at| self.open.get_mut(at));
        let Some(open) = place.and_then(Option::take) else {
            self.record.borrow_mut().fail(format!("acknowledgement of packet {packet_id}, which is not open"));
            return;
        };
        self.free.push(packet_id);
        let counted = self.plan.window.holds(open.due);
        if let Some(entry) = self.log.get_mut(open.log_at) {
            entry.answer = Some((now, if reason >= 0x80 { What::Refused } else { What::Accepted }));
        }
        if reason >= 0x80 {
            self.take_awaited(open.seq);
            self.progress.bad.fetch_add(1, Ordering::Relaxed);
            if counted {
                *self.record.borrow_mut().refused.entry(u16::from(reason)).or_default() += 1;
            }
            return;
        }
        self.progress.done.fetch_add(1, Ordering::Relaxed);
        if counted {
            self.record.borrow_mut().latency.add(now - open.due);
        }
    }

    /// A reply names the stimulus it answers; ours has a known head and a fixed number of digits.
    fn replied(&mut self, payload: &[u8], now: Instant) {
        let Some(at) = find(payload, &self.id_head) else { return };
        let from = at + self.id_head.len();
        let Some(seq) = payload.get(from..from + SEQ_DIGITS).and_then(read_digits) else { return };
        let due = u32::try_from(seq).ok().and_then(|seq| self.take_awaited(seq));
        if let Some(due) = due.filter(|due| self.plan.window.holds(*due)) {
            self.record.borrow_mut().reply.add(now - due);
        }
    }

    /// The intended start of an awaited reply. A second delivery of the same reply finds nothing: the first one counted.
    fn take_awaited(&mut self, seq: u32) -> Option<Instant> {
        let at = seq.checked_sub(self.replies_base)?;
        let due = self.awaited.get_mut(usize::try_from(at).ok()?)?.take()?;
        self.replies_due -= 1;
        while self.awaited.front().is_some_and(Option::is_none) {
            self.awaited.pop_front();
            self.replies_base += 1;
        }
        Some(due)
    }

    /// Arrivals of the window that found no room in the publish window before the run was given up.
    fn count_unsent(&mut self, mut due: Option<Instant>) {
        if self.progress.stopped() || self.schedule.is_none() {
            return;
        }
        let mut unsent = 0;
        while let Some(at) = due {
            unsent += u64::from(self.plan.window.holds(at));
            due = self.next_due();
        }
        self.record.borrow_mut().unanswered += unsent;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn devices(count: usize, instances: u64) -> Devices {
        Devices {
            count,
            instances,
            prefix: "load-".into(),
            tenant: "default".into(),
            login: None,
            window: 16,
            replies: Some(1),
            nonce: "n".into(),
            first_sender: 0,
            payload: Template::default(),
            log: false,
        }
    }

    #[test]
    fn each_instance_belongs_to_one_device() {
        let devices = devices(3, 10);
        let mut all: Vec<String> = (0..3).flat_map(|d| devices.filters(d)).collect();
        assert_eq!(devices.filters(1)[1], "sophont/default/load-0000004/out/reply");
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 10);
    }

    #[test]
    fn a_device_picks_only_its_own() {
        let devices = devices(3, 10);
        let mut random = Random::new(1, 1);
        for device in 0..3 {
            let mut picked: Vec<u64> = (0..200).map(|_| devices.pick(device, &mut random)).collect();
            picked.sort_unstable();
            picked.dedup();
            let own: Vec<u64> = (0..10).filter(|n| n % 3 == device as u64).collect();
            assert_eq!(picked, own);
        }
    }
}
