"""Checks of an MQTT door with real paho clients (3.1.1 and 5) and, where paho is too polite, raw sockets.

Usage: suite.py HOST PORT TENANT [PREFIX]. Prints one line a check; ends with 1 if any failed. PREFIX selects checks by name.
The server must let anybody in as TENANT, answer stimuli on `sophont/TENANT/echo/in/...` with a reply, send no keep-alive
longer than asked for, and take packets up to 1 MiB, 512 publishes at once and sessions of a week.
"""
import itertools
import queue
import socket
import struct
import sys
import threading
import time
import traceback

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

HOST, PORT, TENANT = sys.argv[1], int(sys.argv[2]), sys.argv[3]
PREFIX = sys.argv[4] if len(sys.argv) > 4 else ""
PATIENCE = 20.0
CHECKS = []
NAMES = itertools.count(1)
V3, V5 = mqtt.MQTTv311, mqtt.MQTTv5


def check(*versions):
    """Registers a check for the given protocol versions."""
    def register(function):
        for version in versions:
            name = f"{'v5' if version == V5 else 'v3'} {function.__name__.replace('_', ' ')}"
            CHECKS.append((name, function, version))
        return function
    return register


def unique(word):
    return f"{word}-{next(NAMES)}-{time.monotonic_ns() % 1000000}"


def props(kind, **values):
    made = Properties(kind)
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            setattr(made, name, one)
    return made


class Client:
    """A paho client whose events can be waited for."""

    def __init__(self, version, name=None, clean=True, expiry=0, will=None, connect=True, keepalive=30, **connect_props):
        self.version, self.clean, self.keepalive = version, clean, keepalive
        self.name = unique("c") if name is None else name
        options = {"clean_session": clean} if version == V3 else {}
        self.paho = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=self.name, protocol=version, **options)
        self.paho.max_inflight_messages_set(100)
        self.paho.max_queued_messages_set(0)
        self.messages, self.events = queue.Queue(), queue.Queue()
        self.acks, self.connected = {}, None
        self.changed = threading.Condition()
        self.paho.on_message = lambda _c, _u, message: self.messages.put(message)
        self.paho.on_connect = self.on_connect
        self.paho.on_publish = self.on_publish
        self.paho.on_subscribe = lambda _c, _u, mid, codes, _p: self.events.put(("sub", mid, codes))
        self.paho.on_unsubscribe = lambda _c, _u, mid, codes, _p: self.events.put(("unsub", mid, codes))
        self.paho.on_disconnect = lambda _c, _u, _f, reason, _p: self.events.put(("gone", reason, None))
        if will:
            self.paho.will_set(**will)
        if version == V5 and expiry:
            connect_props["SessionExpiryInterval"] = expiry
        self.connect_props = connect_props
        if connect:
            self.connect()

    def on_connect(self, _client, _data, flags, reason, properties):
        with self.changed:
            self.connected = (flags, reason, properties)
            self.changed.notify_all()

    def on_publish(self, _client, _data, mid, reason, properties):
        with self.changed:
            self.acks[mid] = reason
            self.changed.notify_all()

    def connect(self, expect=0):
        self.connected = None
        options = {}
        if self.version == V5:
            options = {"clean_start": self.clean, "properties": props(PacketTypes.CONNECT, **self.connect_props)}
        self.paho.connect(HOST, PORT, self.keepalive, **options)
        self.paho.loop_start()
        self.until(lambda: self.connected is not None, "CONNACK")
        assert self.connected[1].value == expect, f"CONNACK {self.connected[1]}"
        return self

    def until(self, holds, what):
        with self.changed:
            assert self.changed.wait_for(holds, PATIENCE), f"waited in vain for {what}"

    @property
    def present(self):
        return self.connected[0].session_present

    def subscribe(self, topic, qos=0, expect=None, options=None, sub_id=None):
        properties = props(PacketTypes.SUBSCRIBE, SubscriptionIdentifier=sub_id) if sub_id else None
        _, mid = self.paho.subscribe(topic, qos, options, properties) if options or properties else \
            self.paho.subscribe(topic, qos)
        codes = self.event("sub", mid)
        code = codes[0].value
        assert code == (expect if expect is not None else (options.QoS if options else qos)), f"SUBACK {codes}"
        return self

    def event(self, kind, mid=None):
        limit = time.monotonic() + PATIENCE
        while True:
            got = self.events.get(timeout=max(0.01, limit - time.monotonic()))
            if got[0] == kind and (mid is None or got[1] == mid):
                return got[1] if kind == "gone" else got[2]

    def publish(self, topic, payload, qos=1, retain=False, wait=True, **properties):
        made = props(PacketTypes.PUBLISH, **properties) if properties else None
        info = self.paho.publish(topic, payload, qos, retain, made)
        if wait and qos:
            self.until(lambda: info.mid in self.acks, f"the ack of {topic}")
            return self.acks[info.mid].value
        if wait:
            info.wait_for_publish(PATIENCE)
        return info.mid

    def get(self):
        try:
            return self.messages.get(timeout=PATIENCE)
        except queue.Empty:
            raise AssertionError("no message came") from None

    def texts(self, count):
        return [self.get().payload.decode() for _ in range(count)]

    def nothing_more(self):
        """No message is under way: what is published now comes next."""
        fence = unique("fence")
        self.subscribe(fence)
        self.publish(fence, "fence", qos=0)
        got = self.get()
        assert got.topic == fence, f"unexpected message on {got.topic}: {got.payload[:60]}"

    def disconnect(self, **values):
        reason = ReasonCode(PacketTypes.DISCONNECT, identifier=values.pop("reason")) if "reason" in values else None
        properties = props(PacketTypes.DISCONNECT, **values) if values else None
        self.paho.disconnect(reason, properties)
        self.event("gone")
        self.paho.loop_stop()

    def drop(self):
        """The network is gone: no DISCONNECT."""
        self.paho.loop_stop()
        sock = self.paho.socket()
        if sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


class Raw:
    """A socket that says what it wants."""

    def __init__(self, first=b""):
        self.sock = socket.create_connection((HOST, PORT), timeout=PATIENCE)
        self.buffer = b""
        if first:
            self.sock.sendall(first)

    def send(self, data):
        self.sock.sendall(data)
        return self

    def packet(self):
        """The next packet: first byte and body; None at the end of the stream."""
        while True:
            if len(self.buffer) >= 2:
                length, shift, at = 0, 0, 1
                while at < len(self.buffer):
                    byte = self.buffer[at]
                    length |= (byte & 0x7F) << shift
                    shift, at = shift + 7, at + 1
                    if not byte & 0x80:
                        if len(self.buffer) >= at + length:
                            body = self.buffer[at:at + length]
                            first, self.buffer = self.buffer[0], self.buffer[at + length:]
                            return first, body
                        break
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.buffer += data


def kept(v, topic):
    """What a new subscription finds there; None when there is nothing."""
    client = Client(v).subscribe(topic, 1)
    fence = unique("fence")
    client.subscribe(fence).publish(fence, "fence", qos=0)
    got = client.get()
    return None if got.topic == fence else got


def until_kept(v, topic, payload):
    """A will has no acknowledgement to wait for: on PostgreSQL it may be heard before its value is written."""
    limit = time.monotonic() + PATIENCE
    while True:
        got = kept(v, topic)
        if got is not None and got.payload == payload:
            return got
        assert time.monotonic() < limit, f"waited in vain for {payload} to be kept, found {got and got.payload}"


def text(value):
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def varint(value):
    out = b""
    while True:
        byte, value = value & 0x7F, value >> 7
        out += bytes([byte | (0x80 if value else 0)])
        if not value:
            return out


def frame(first, body):
    return bytes([first]) + varint(len(body)) + body


def connect_packet(version, name, clean=True, keepalive=30, properties=b""):
    level = 5 if version == V5 else 4
    middle = varint(len(properties)) + properties if version == V5 else b""
    return frame(0x10, text("MQTT") + bytes([level, 2 if clean else 0]) + struct.pack(">H", keepalive) + middle + text(name))


def publish_packet(version, topic, payload, qos=1, mid=1, dup=False, properties=b""):
    middle = varint(len(properties)) + properties if version == V5 else b""
    ident = struct.pack(">H", mid) if qos else b""
    return frame(0x30 | (qos << 1) | (8 if dup else 0), text(topic) + ident + middle + payload)


def raw_client(version, name=None, **options):
    raw = Raw(connect_packet(version, name or unique("raw"), **options))
    first, body = raw.packet()
    assert first == 0x20 and body[1] == 0, body
    return raw


def told(raw, version, code):
    """The connection ends; on MQTT 5 with this reason."""
    got = raw.packet()
    if version == V5:
        assert got is not None and got[0] == 0xE0 and got[1][0] == code, got
        got = raw.packet()
    assert got is None, got


# ---- plain publish and subscribe -------------------------------------------------------------------------------------

@check(V3, V5)
def qos_0_1_and_2_are_delivered(v):
    topic = unique("t")
    sub, pub = Client(v).subscribe(topic, 2), Client(v)
    for qos in (0, 1, 2):
        pub.publish(topic, f"m{qos}", qos)
        got = sub.get()
        assert (got.payload, got.qos, got.retain) == (f"m{qos}".encode(), qos, False), got


@check(V3, V5)
def the_lower_qos_wins(v):
    topic = unique("t")
    low, high, pub = Client(v).subscribe(topic, 0), Client(v).subscribe(topic, 2), Client(v)
    pub.publish(topic, "x", 1)
    assert (low.get().qos, high.get().qos) == (0, 1)


def burst(v, qos, count=500):
    topic = unique("burst")
    sub, pub = Client(v).subscribe(topic, qos), Client(v)
    mids = [pub.publish(topic, str(n), qos, wait=False) for n in range(count)]
    assert sub.texts(count) == [str(n) for n in range(count)]
    pub.until(lambda: all(mid in pub.acks for mid in mids), "all acks")
    sub.nothing_more()


@check(V3, V5)
def five_hundred_qos_1_arrive_once_and_in_order(v):
    burst(v, 1)


@check(V3, V5)
def five_hundred_qos_2_arrive_once_and_in_order(v):
    burst(v, 2)


@check(V3, V5)
def wildcards_select(v):
    base = unique("w")
    plus, rest = Client(v).subscribe(f"{base}/+/c"), Client(v).subscribe(f"{base}/#")
    pub = Client(v)
    for topic in (base, f"{base}/b/c", f"{base}/b/d", f"{base}/b/c/d"):
        pub.publish(topic, topic)
    assert plus.texts(1) == [f"{base}/b/c"]
    assert rest.texts(4) == [base, f"{base}/b/c", f"{base}/b/d", f"{base}/b/c/d"]
    plus.nothing_more()


@check(V3, V5)
def unsubscribe_ends_it(v):
    topic = unique("t")
    client = Client(v).subscribe(topic, 1)
    _, mid = client.paho.unsubscribe(topic)
    client.event("unsub", mid)
    client.publish(topic, "x")
    client.nothing_more()


@check(V3, V5)
def overlapping_subscriptions_deliver_once(v):
    base = unique("o")
    client = Client(v).subscribe(f"{base}/#", 0).subscribe(f"{base}/+", 2).subscribe(f"{base}/a", 1)
    client.publish(f"{base}/a", "x", 2)
    assert client.get().qos == 2
    client.nothing_more()


@check(V3, V5)
def a_large_payload_comes_through(v):
    topic, payload = unique("big"), bytes(range(256)) * 2000
    client = Client(v).subscribe(topic, 1)
    client.publish(topic, payload)
    assert client.get().payload == payload


@check(V3, V5)
def topics_may_be_unicode(v):
    topic = unique("grün/ü/日本")
    client = Client(v).subscribe(topic, 1)
    client.publish(topic, "é")
    got = client.get()
    assert (got.topic, got.payload.decode()) == (topic, "é")


# ---- retained --------------------------------------------------------------------------------------------------------

@check(V3, V5)
def retained_values_are_kept_replaced_and_cleared(v):
    topic = unique("r")
    pub = Client(v)
    pub.publish(topic, "old", retain=True)
    pub.publish(topic, "new", retain=True)
    got = Client(v).subscribe(topic, 1).get()
    assert (got.payload, got.retain, got.qos) == (b"new", True, 1)
    pub.publish(topic, b"", retain=True)
    Client(v).subscribe(topic, 1).nothing_more()


@check(V3, V5)
def retained_values_are_found_by_wildcard(v):
    base = unique("r")
    pub = Client(v)
    for name in ("a", "b/c", "d"):
        pub.publish(f"{base}/{name}", name, retain=True)
    sub = Client(v).subscribe(f"{base}/#", 1)
    assert sorted(sub.texts(3)) == ["a", "b/c", "d"]
    sub.nothing_more()


@check(V3, V5)
def live_subscribers_get_retained_values_unmarked(v):
    topic = unique("r")
    client = Client(v).subscribe(topic, 1)
    client.publish(topic, "x", retain=True)
    assert not client.get().retain


# ---- wills -----------------------------------------------------------------------------------------------------------

@check(V3, V5)
def a_lost_client_s_will_is_sent(v):
    topic = unique("will")
    sub = Client(v).subscribe(topic, 1)
    Client(v, will={"topic": topic, "payload": "gone", "qos": 1}).drop()
    assert sub.texts(1) == ["gone"]


@check(V3, V5)
def a_will_may_be_retained(v):
    topic = unique("will")
    sub = Client(v).subscribe(topic, 1)
    Client(v, will={"topic": topic, "payload": "gone", "qos": 1, "retain": True}).drop()
    sub.get()
    assert until_kept(v, topic, b"gone").retain


@check(V3, V5)
def a_goodbye_cancels_the_will(v):
    topic = unique("will")
    sub = Client(v).subscribe(topic, 1)
    Client(v, will={"topic": topic, "payload": "gone", "qos": 1}).disconnect()
    sub.publish(topic, "fence")
    assert sub.texts(1) == ["fence"]


@check(V3, V5)
def a_will_may_be_presence(v):
    topic = f"sophont/{TENANT}/{unique('i')}/presence"
    sub = Client(v).subscribe(topic, 1)
    device = Client(v, will={"topic": topic, "payload": "offline", "qos": 1, "retain": True})
    assert device.publish(topic, "online") == 0
    assert sub.texts(1) == ["online"]
    assert Client(v).subscribe(topic, 1).get().payload == b"online"
    device.drop()
    assert sub.texts(1) == ["offline"]
    assert until_kept(v, topic, b"offline").retain


# ---- sessions --------------------------------------------------------------------------------------------------------

@check(V3, V5)
def a_session_is_there_again(v):
    name = unique("s")
    first = Client(v, name, clean=False, expiry=600)
    assert not first.present
    first.disconnect()
    again = Client(v, name, clean=False, expiry=600)
    assert again.present
    again.disconnect()
    assert not Client(v, name, clean=True).present


def offline(v, qos):
    name, topic = unique("s"), unique("off")
    Client(v, name, clean=False, expiry=600).subscribe(topic, qos).disconnect()
    pub = Client(v)
    for n in range(20):
        pub.publish(topic, str(n), qos)
    pub.publish(topic, "weak", 0)
    pub.publish(unique("fence"), "the server has seen the one before", 1)
    again = Client(v, name, clean=False, expiry=600)
    got = [again.get() for _ in range(20)]
    assert [m.payload.decode() for m in got] == [str(n) for n in range(20)]
    assert {m.qos for m in got} == {qos}
    again.nothing_more()


@check(V3, V5)
def qos_1_waits_for_a_client_that_is_away(v):
    offline(v, 1)


@check(V3, V5)
def qos_2_waits_for_a_client_that_is_away(v):
    offline(v, 2)


@check(V3, V5)
def a_clean_start_forgets(v):
    name, topic = unique("s"), unique("t")
    Client(v, name, clean=False, expiry=600).subscribe(topic, 1).disconnect()
    Client(v).publish(topic, "x")
    Client(v, name, clean=True).disconnect()
    again = Client(v, name, clean=False, expiry=600)
    assert not again.present
    again.nothing_more()


@check(V3, V5)
def unacknowledged_messages_come_again_marked(v):
    name, topic = unique("s"), unique("t")
    properties = b"\x11\0\0\x02\x58" if v == V5 else b""
    raw = raw_client(v, name, clean=False, properties=properties)
    raw.send(frame(0x82, b"\0\1" + (b"\0" if v == V5 else b"") + text(topic) + b"\1"))
    assert raw.packet()[0] == 0x90
    Client(v).publish(topic, "x")
    first, body = raw.packet()
    assert first == 0x32
    raw.sock.close()
    raw = raw_client(v, name, clean=False, properties=properties)
    again, same = raw.packet()
    assert (again, same) == (0x3A, body)
    at = 2 + len(topic)
    raw.send(frame(0x40, body[at:at + 2]))
    raw.send(b"\xc0\0")
    assert raw.packet() == (0xD0, b"")
    raw.sock.close()
    raw = raw_client(v, name, clean=False, properties=properties)
    raw.send(b"\xc0\0")
    assert raw.packet() == (0xD0, b"")


@check(V3, V5)
def a_newer_connection_takes_over(v):
    name = unique("s")
    old = Client(v, name, clean=False, expiry=600)
    old.paho.reconnect_delay_set(60, 60)
    new = Client(v, name, clean=False, expiry=600)
    reason = old.event("gone")
    assert v == V3 or reason.value == 0x8E, reason
    assert new.present
    new.subscribe(unique("t"), 1)
    old.paho.loop_stop()


@check(V3, V5)
def qos_2_is_not_doubled_by_a_repeat(v):
    topic = unique("t")
    sub = Client(v).subscribe(topic, 2)
    raw = raw_client(v)
    packet = publish_packet(v, topic, b"once", qos=2, mid=7)
    raw.send(packet)
    assert raw.packet()[0] == 0x50
    raw.send(publish_packet(v, topic, b"once", qos=2, mid=7, dup=True))
    assert raw.packet()[0] == 0x50
    raw.send(frame(0x62, b"\0\7"))
    assert raw.packet()[0] == 0x70
    assert sub.texts(1) == ["once"]
    sub.nothing_more()


# ---- shared subscriptions --------------------------------------------------------------------------------------------

@check(V3, V5)
def a_group_shares_and_two_groups_get_one_each(v):
    topic, one, two = unique("t"), unique("g"), unique("h")
    members = [Client(v).subscribe(f"$share/{one}/{topic}", 1) for _ in range(2)]
    other = Client(v).subscribe(f"$share/{two}/{topic}", 1)
    pub = Client(v)
    for n in range(10):
        pub.publish(topic, str(n))
    shares = [m.texts(5) for m in members]
    assert sorted(shares[0] + shares[1], key=int) == [str(n) for n in range(10)]
    assert other.texts(10) == [str(n) for n in range(10)]
    for client in members + [other]:
        client.nothing_more()


@check(V3, V5)
def shared_subscriptions_get_no_retained_values(v):
    topic = unique("t")
    client = Client(v)
    client.publish(topic, "x", retain=True)
    client.subscribe(f"$share/{unique('g')}/{topic}", 1)
    client.nothing_more()


# ---- instances -------------------------------------------------------------------------------------------------------

@check(V3, V5)
def a_stimulus_is_answered_on_out_reply(v):
    instance = f"sophont/{TENANT}/echo"
    client = Client(v).subscribe(f"{instance}/out/#", 1)
    word = unique("hello")
    assert client.publish(f"{instance}/in/chat", word, 1) == 0
    while word not in client.get().payload.decode():
        pass


@check(V3, V5)
def stimuli_of_every_qos_and_shape_are_taken(v):
    instance = f"sophont/{TENANT}/{unique('i')}"
    client = Client(v)
    for n, payload in enumerate(("text", '{"celsius": 21}', b"\xff\x00", "", "[1]")):
        for qos in (0, 1, 2):
            got = client.publish(f"{instance}/in/room/{n}", payload, qos)
            assert qos == 0 or got == 0, got


@check(V3, V5)
def reported_state_is_taken(v):
    client = Client(v)
    topic = f"sophont/{TENANT}/{unique('i')}/state/reported"
    assert client.publish(topic, '{"on": true}', 1) == 0
    assert client.publish(topic, '{"on": null}', 2) == 0


@check(V3, V5)
def what_is_refused_is_told(v):
    instance = f"sophont/{TENANT}/{unique('i')}"
    client = Client(v).subscribe(f"{instance}/out/errors", 1)
    cases = [(f"{instance}/state/reported", "no object", 0x99), (f"{instance}/in/a//b", "x", 0x90),
             (f"{instance}/out/x", "x", 0x87), (f"{instance}/presence", "maybe", 0x99)]
    for qos in (1, 2):
        for topic, payload, code in cases:
            got = client.publish(topic, payload, qos)
            # paho releases even what was refused, and reports the answer to that: the id is unknown then.
            expected = 0 if v == V3 else code if qos == 1 else 0x92
            assert got == expected, (topic, got)
            if v == V3:
                report = client.get().payload.decode()
                assert f'"code":{code}' in report and topic in report, report
    client.nothing_more()


@check(V3, V5)
def another_tenant_is_out_of_reach(v):
    client = Client(v)
    failure = 0x87 if v == V5 else 0x80
    for topic in ("sophont/other/lamp/out/#", "sophont/+/lamp/out/x", "sophont/#", "$share/g/sophont/other/#", "$SYS/#"):
        client.subscribe(topic, 1, expect=failure)
    for topic in ("sophont/other/lamp/in/x", "sophont/other/lamp/presence"):
        assert client.publish(topic, "x") == (0x87 if v == V5 else 0)
    assert client.publish("$SYS/x", "x") == (0x90 if v == V5 else 0)


# ---- hostile clients -------------------------------------------------------------------------------------------------

@check(V3, V5)
def bad_filters_are_refused_one_by_one(v):
    raw = raw_client(v)
    filters = b"".join(text(f) + b"\1" for f in ("a/#/b", "a+", "good", "x" * 2000, "a\0b", "$share/g"))
    raw.send(frame(0x82, b"\0\1" + (b"\0" if v == V5 else b"") + filters))
    first, body = raw.packet()
    bad = 0x8F if v == V5 else 0x80
    codes = list(body[-6:])
    assert (first, codes) == (0x90, [bad, bad, 1, bad, bad, bad]), codes


@check(V3, V5)
def a_publish_on_a_wildcard_or_with_nul_is_refused(v):
    for topic in ("a/+", "#", "a\0b", "x" * 2000):
        raw = raw_client(v)
        raw.send(publish_packet(v, topic, b"x"))
        first, body = raw.packet()
        assert first == 0x40 and (v == V3 or body[2] == 0x90), body


@check(V3, V5)
def the_first_packet_must_be_connect(v):
    assert Raw(publish_packet(v, "a", b"x", qos=0)).packet() is None
    assert Raw(b"GET / HTTP/1.1\r\n\r\n").packet() is None


@check(V3, V5)
def a_second_connect_ends_the_connection(v):
    raw = raw_client(v)
    raw.send(connect_packet(v, "again"))
    told(raw, v, 0x82)


@check(V3, V5)
def malformed_packets_end_the_connection(v):
    for packet in (b"\x36\x05\0\1a\0\1", b"\x00\x00", b"\x82\x02\0\1", b"\x30\xff\xff\xff\xff\x01", b"\x40\x01\0"):
        raw = raw_client(v)
        raw.send(packet)
        got = raw.packet()
        assert got is None or (got[0] == 0xE0 and got[1][0] in (0x81, 0x82, 0x83, 0x8F)), (packet, got)
        assert got is None or raw.packet() is None


@check(V3, V5)
def an_oversized_packet_ends_the_connection(v):
    raw = raw_client(v)
    raw.send(b"\x30" + varint(200_000_000))
    told(raw, v, 0x95)


@check(V3, V5)
def silence_ends_the_connection(v):
    raw = raw_client(v, keepalive=1)
    started = time.monotonic()
    told(raw, v, 0x8D)
    assert 1.2 < time.monotonic() - started < 5


@check(V3, V5)
def pings_keep_it_open(v):
    raw = raw_client(v, keepalive=1)
    for _ in range(4):
        time.sleep(0.6)  # the client's own pace: what is tested is time
        raw.send(b"\xc0\0")
        assert raw.packet() == (0xD0, b"")


@check(V3, V5)
def packets_may_come_in_pieces(v):
    topic = unique("t")
    sub = Client(v).subscribe(topic, 1)
    raw = Raw()
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in connect_packet(v, unique("slow")) + publish_packet(v, topic, b"bit by bit"):
        raw.send(bytes([byte]))
    assert raw.packet()[0] == 0x20 and raw.packet()[0] == 0x40
    assert sub.texts(1) == ["bit by bit"]


@check(V3, V5)
def an_empty_client_id_gets_one(v):
    client = Client(v, name="")
    if v == V5:
        assert client.connected[2].AssignedClientIdentifier
    topic = unique("t")
    client.subscribe(topic, 1).publish(topic, "x")
    assert client.texts(1) == ["x"]


@check(V3)
def mqtt_3_1_still_works(_v):
    topic = unique("t")
    client = Client(V3, connect=False)
    client.paho = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client.name, protocol=mqtt.MQTTv31)
    client.paho.on_connect, client.paho.on_publish = client.on_connect, client.on_publish
    client.paho.on_message = lambda _c, _u, message: client.messages.put(message)
    client.paho.on_subscribe = lambda _c, _u, mid, codes, _p: client.events.put(("sub", mid, codes))
    client.connect().subscribe(topic, 1).publish(topic, "x")
    assert client.texts(1) == ["x"]


@check(V5)
def an_unknown_protocol_version_is_told_so(_v):
    raw = Raw(frame(0x10, text("MQTT") + bytes([9, 2]) + b"\0\x1e" + text("x")))
    assert raw.packet() == (0x20, b"\0\1")


# ---- MQTT 5 ----------------------------------------------------------------------------------------------------------

@check(V5)
def connack_says_what_the_server_takes(_v):
    known = Client(V5, expiry=0xFFFFFFFF, clean=True).connected[2]
    assert (known.ReceiveMaximum, known.MaximumPacketSize) == (512, 1024 * 1024)
    assert known.TopicAliasMaximum > 0 and known.SessionExpiryInterval == 604800


@check(V5)
def no_keep_alive_gets_the_server_s(_v):
    assert Client(V5, keepalive=0).connected[2].ServerKeepAlive > 0
    assert not hasattr(Client(V5, keepalive=5).connected[2], "ServerKeepAlive")


@check(V5)
def response_information_on_request(_v):
    assert Client(V5, RequestResponseInformation=1).connected[2].ResponseInformation
    assert not hasattr(Client(V5).connected[2], "ResponseInformation")


@check(V5)
def no_local(_v):
    topic = unique("t")
    client = Client(V5).subscribe(topic, options=SubscribeOptions(qos=1, noLocal=True))
    client.publish(topic, "own")
    Client(V5).publish(topic, "other")
    assert client.texts(1) == ["other"]


@check(V5)
def retain_as_published(_v):
    topic = unique("t")
    kept = Client(V5).subscribe(topic, options=SubscribeOptions(qos=1, retainAsPublished=True))
    kept.publish(topic, "x", retain=True)
    assert kept.get().retain
    kept.publish(topic, "y")
    assert not kept.get().retain


@check(V5)
def retain_handling(_v):
    topic = unique("t")
    client = Client(V5)
    client.publish(topic, "x", retain=True)
    handling = lambda n: SubscribeOptions(qos=1, retainHandling=n)  # noqa: E731
    client.subscribe(topic, options=handling(2)).nothing_more()
    client.subscribe(topic, options=handling(1)).nothing_more()
    client.subscribe(topic, options=handling(0))
    assert client.texts(1) == ["x"]
    other = Client(V5).subscribe(topic, options=handling(1))
    assert other.texts(1) == ["x"]
    other.subscribe(topic, options=handling(1)).nothing_more()


@check(V5)
def subscription_identifiers(_v):
    base = unique("t")
    client = Client(V5)
    client.publish(f"{base}/r", "r", retain=True)
    client.subscribe(f"{base}/#", options=SubscribeOptions(qos=1), sub_id=7)
    assert client.get().properties.SubscriptionIdentifier == [7]
    client.subscribe(f"{base}/a", options=SubscribeOptions(qos=1), sub_id=300000)
    client.publish(f"{base}/a", "x")
    assert sorted(client.get().properties.SubscriptionIdentifier) == [7, 300000]


@check(V5)
def topic_aliases(_v):
    one, two = unique("t"), unique("t")
    sub = Client(V5).subscribe(one, 1).subscribe(two, 1)
    raw = raw_client(V5)
    for topic, mid, alias in ((one, 1, 3), ("", 2, 3), (two, 3, 3), ("", 4, 3)):
        raw.send(publish_packet(V5, topic, str(mid).encode(), mid=mid, properties=b"\x23" + struct.pack(">H", alias)))
        assert raw.packet()[0] == 0x40
    got = [sub.get() for _ in range(4)]
    assert [(m.topic, m.payload) for m in got] == [(one, b"1"), (one, b"2"), (two, b"3"), (two, b"4")]


@check(V5)
def bad_topic_aliases_end_the_connection(_v):
    for topic, alias, code in (("a", 0xFFFF, 0x94), ("", 5, 0x82)):
        raw = raw_client(V5)
        raw.send(publish_packet(V5, topic, b"x", properties=b"\x23" + struct.pack(">H", alias)))
        told(raw, V5, code)


@check(V5)
def the_client_s_receive_maximum_is_kept(_v):
    topic = unique("t")
    raw = raw_client(V5, properties=b"\x21\0\2")
    raw.send(frame(0x82, b"\0\1\0" + text(topic) + b"\1"))
    assert raw.packet()[0] == 0x90
    pub = Client(V5)
    for n in range(5):
        pub.publish(topic, str(n))
    ids = [raw.packet()[1][2 + len(topic):4 + len(topic)] for _ in range(2)]
    raw.send(b"\xc0\0")
    assert raw.packet() == (0xD0, b""), "a third message came before an ack"
    raw.send(frame(0x40, ids[0]))
    assert raw.packet()[0] == 0x32


@check(V5)
def the_server_s_receive_maximum_is_enforced(_v):
    raw = raw_client(V5)
    raw.send(b"".join(publish_packet(V5, "a", b"x", qos=2, mid=n) for n in range(1, 515)))
    while (got := raw.packet()) is not None and got[0] == 0x50:
        pass
    assert got is not None and got[0] == 0xE0 and got[1][0] == 0x93, got


@check(V5)
def what_is_too_large_for_the_client_is_left_out(_v):
    topic = unique("t")
    client = Client(V5, MaximumPacketSize=200)
    client.subscribe(topic, 1)
    pub = Client(V5)
    pub.publish(topic, "x" * 500)
    pub.publish(topic, "small")
    assert client.texts(1) == ["small"]


@check(V5)
def expired_messages_are_left_out_and_others_say_what_is_left(_v):
    name, topic = unique("s"), unique("t")
    Client(V5, name, clean=False, expiry=600).subscribe(topic, 1).disconnect()
    pub = Client(V5)
    pub.publish(topic, "short", MessageExpiryInterval=1)
    pub.publish(topic, "long", MessageExpiryInterval=1000)
    time.sleep(1.5)  # what is tested is time
    again = Client(V5, name, clean=False, expiry=600)
    got = again.get()
    assert got.payload == b"long" and 990 <= got.properties.MessageExpiryInterval < 1000, got.properties


@check(V5)
def expired_retained_values_are_left_out(_v):
    topic = unique("t")
    client = Client(V5)
    client.publish(topic, "x", retain=True, MessageExpiryInterval=1)
    time.sleep(1.5)  # what is tested is time
    client.subscribe(topic, 1).nothing_more()


@check(V5)
def a_session_lives_as_long_as_it_asked(_v):
    name = unique("s")
    Client(V5, name, clean=False, expiry=1).disconnect()
    time.sleep(1.8)  # what is tested is time
    assert not Client(V5, name, clean=False, expiry=1).present
    other = unique("s")
    Client(V5, other, clean=False, expiry=0).disconnect()
    assert not Client(V5, other, clean=False, expiry=0).present


@check(V5)
def disconnect_may_change_the_expiry(_v):
    name = unique("s")
    raw = raw_client(V5, name, clean=False, properties=b"\x11" + struct.pack(">I", 600))
    # It ends the connection when it has read this; a new one could be looked at before.
    raw.send(frame(0xE0, b"\0\5\x11\0\0\0\0"))
    assert raw.packet() is None
    assert not Client(V5, name, clean=False, expiry=600).present
    raw = raw_client(V5)
    raw.send(frame(0xE0, b"\0\5\x11\0\0\0\x0a"))
    told(raw, V5, 0x82)


@check(V5)
def properties_travel_with_a_message(_v):
    topic = unique("t")
    client = Client(V5).subscribe(topic, 1)
    client.publish(topic, "x", UserProperty=[("a", "1"), ("b", "2"), ("a", "3")], ContentType="text/plain",
                   ResponseTopic="back/here", CorrelationData=b"\0\1\2", PayloadFormatIndicator=1)
    got = client.get().properties
    assert got.UserProperty == [("a", "1"), ("b", "2"), ("a", "3")], got
    assert (got.ContentType, got.ResponseTopic, got.CorrelationData) == ("text/plain", "back/here", b"\0\1\2")
    assert got.PayloadFormatIndicator == 1


@check(V5)
def a_reply_comes_on_the_response_topic(_v):
    topic = unique("replies")
    client = Client(V5).subscribe(topic, 1)
    assert client.publish(f"sophont/{TENANT}/echo/in/chat", "hi", ResponseTopic=topic, CorrelationData=b"\1\2") == 0
    got = client.get()
    assert got.properties.CorrelationData == b"\1\2" and got.properties.ContentType == "application/json"
    assert any(name == "effect" for name, _ in got.properties.UserProperty)


@check(V5)
def bad_properties_of_a_stimulus_are_refused(_v):
    client = Client(V5)
    topic = f"sophont/{TENANT}/{unique('i')}/in/x"
    for name, value in (("id", "a b"), ("priority", "urgent"), ("salience", "7")):
        assert client.publish(topic, "x", UserProperty=[(name, value)]) == 0x99
    assert client.publish(topic, b"\xff", PayloadFormatIndicator=1) == 0x99
    assert client.publish(topic, "{", ContentType="application/json") == 0x99
    assert client.publish(topic, "x", ResponseTopic="sophont/other/a/out/b") == 0x87
    good = [("id", unique("id")), ("priority", "human"), ("salience", "0.5")]
    assert client.publish(topic, "x", UserProperty=good) == 0


@check(V5)
def the_payload_format_of_plain_messages_is_checked(_v):
    assert Client(V5).publish(unique("t"), b"\xff", PayloadFormatIndicator=1) == 0x99


@check(V5)
def a_delayed_will_is_sent_later_and_cancelled_by_a_return(_v):
    name, topic = unique("s"), unique("will")
    sub = Client(V5).subscribe(topic, 1)
    will = {"topic": topic, "payload": "gone", "qos": 1, "properties": props(PacketTypes.WILLMESSAGE, WillDelayInterval=2)}
    Client(V5, name, clean=False, expiry=600, will=will).drop()
    back = Client(V5, name, clean=False, expiry=600, will=will)
    started = time.monotonic()
    back.drop()
    assert sub.texts(1) == ["gone"] and time.monotonic() - started > 1.5
    sub.nothing_more()


@check(V5)
def the_end_of_the_session_sends_the_will_early(_v):
    topic = unique("will")
    sub = Client(V5).subscribe(topic, 1)
    will = {"topic": topic, "payload": "gone", "qos": 1, "properties": props(PacketTypes.WILLMESSAGE, WillDelayInterval=600)}
    Client(V5, clean=True, will=will).drop()
    assert sub.texts(1) == ["gone"]


@check(V5)
def disconnect_with_will(_v):
    topic = unique("will")
    sub = Client(V5).subscribe(topic, 1)
    Client(V5, will={"topic": topic, "payload": "bye", "qos": 1}).disconnect(reason=4)
    assert sub.texts(1) == ["bye"]


@check(V5)
def unsubscribing_from_nothing_is_told(_v):
    client = Client(V5)
    _, mid = client.paho.unsubscribe(unique("t"))
    assert client.event("unsub", mid)[0].value == 0x11


@check(V5)
def no_local_on_a_shared_subscription_is_a_protocol_error(_v):
    raw = raw_client(V5)
    raw.send(frame(0x82, b"\0\1\0" + text("$share/g/a") + b"\5"))
    told(raw, V5, 0x82)


@check(V5)
def enhanced_authentication_is_refused(_v):
    raw = Raw(connect_packet(V5, unique("a"), properties=b"\x15" + text("SCRAM")))
    first, body = raw.packet()
    assert (first, body[1]) == (0x20, 0x8C)


@check(V5)
def an_unknown_release_is_told(_v):
    raw = raw_client(V5)
    raw.send(frame(0x62, b"\0\x63"))
    first, body = raw.packet()
    assert (first, body[:3]) == (0x70, b"\0\x63\x92")


@check(V5)
def a_will_that_may_not_be_sent_is_refused(_v):
    will = {"topic": "sophont/other/lamp/presence", "payload": "x", "qos": 1}
    client = Client(V5, will=will, connect=False)
    client.connect(expect=0x87)


def main():
    failed = 0
    chosen = [one for one in CHECKS if one[0].startswith(PREFIX)]
    for name, function, version in chosen:
        started = time.monotonic()
        try:
            function(version)
            print(f"ok    {name} ({time.monotonic() - started:.2f} s)", flush=True)
        except Exception:  # noqa: BLE001
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} checks passed", flush=True)
    sys.exit(1 if failed or not chosen else 0)


main()
