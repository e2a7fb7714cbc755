"""One message over MQTT on WebSocket, larger than a frame of the server. Usage: websocket.py PORT"""
import queue
import sys

import paho.mqtt.client as mqtt

events = queue.Queue()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, transport="websockets", protocol=mqtt.MQTTv5)
client.ws_set_options("/mqtt")
client.on_connect = lambda *_: events.put("connected")
client.on_subscribe = lambda *_: events.put("subscribed")
client.on_message = lambda _client, _data, message: events.put(len(message.payload))
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_start()
assert events.get(timeout=20) == "connected"
client.subscribe("over/websocket", 1)
assert events.get(timeout=20) == "subscribed"
client.publish("over/websocket", "x" * 300_000, 1)
assert events.get(timeout=20) == 300_000
client.disconnect()
