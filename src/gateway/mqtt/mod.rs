//! The MQTT door.
