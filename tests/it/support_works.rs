//! The support itself: the broker, its clients, TLS and paho are there and do what tests will ask of them.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::support::{Mosquitto, PATIENCE, free_port, mosquitto, program, wait_for};

#[tokio::test]
async fn mosquitto_runs_and_keeps_retained_values_over_a_restart() {
    let mut broker = Mosquitto::start().await;
    let sent = mosquitto::publish(broker.address(), &["-t", "a/b", "-m", "hello", "-q", "1", "-r"]).await;
    assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    broker.stop(Signal::SIGTERM).await;
    broker.start_again().await;
    let subscriber = mosquitto::Subscriber::start(broker.address(), &["-t", "a/#", "-F", "%t %p"]).await;
    assert_eq!(subscriber.wait(1).await, ["a/b hello"]);
}

#[tokio::test]
async fn mosquitto_with_tls_and_a_password_refuses_who_has_neither() {
    let broker = Mosquitto::builder().tls().password("device", "secret").start().await;
    let ca = broker.certificates().ca.display().to_string();
    let tls = ["--cafile", ca.as_str(), "-t", "a", "-m", "x", "-q", "1"];
    let good = [&tls[..], &["-u", "device", "-P", "secret"]].concat();
    assert!(mosquitto::publish(broker.tls_address(), &good).await.status.success());
    assert!(!mosquitto::publish(broker.tls_address(), &tls).await.status.success());
    assert!(!mosquitto::publish(broker.tls_address(), &["-t", "a", "-m", "x"]).await.status.success());
}

#[tokio::test]
async fn paho_is_installed() {
    let mut command = Command::new(program::python());
    command.args(["-c", "import paho.mqtt; print(paho.mqtt.__version__)"]);
    assert!(program::succeed(command, PATIENCE).await.starts_with("2."));
}

#[tokio::test]
#[should_panic(expected = "in vain for: the moon")]
async fn a_wait_ends_and_names_what_it_waited_for() {
    wait_for::<()>("the moon", Duration::from_millis(20), async || None).await;
}

#[test]
#[should_panic(expected = "run tests/install")]
fn a_missing_program_fails_with_the_command_that_installs_it() {
    program::find("no-such-program");
}

#[test]
fn free_ports_differ() {
    assert_ne!(free_port(), free_port());
}
