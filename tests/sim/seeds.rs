//! Many histories, each from its seed. `SOPHONT_SIM_SEEDS=10000` runs so many; `SOPHONT_SIM_SEED=123` runs one again.

use std::{collections::BTreeSet, env};

use crate::{
    history::Wrong,
    world::{Outcome, Settings, World},
};

/// Histories when nobody says how many.
const USUAL: u64 = 300;
/// Within so many a store without one of its checks must be caught.
const CAUGHT_WITHIN: u64 = 200;

const fn sound(seed: u64) -> Settings {
    Settings { seed, fence: true, dedupe: true, behind: true }
}

fn run(settings: Settings) -> Outcome {
    World::new(settings).run()
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn no_history_breaks_a_promise() {
    let seeds = match number("SOPHONT_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SOPHONT_SIM_SEEDS").unwrap_or(USUAL),
    };
    let (mut commits, mut faults, mut taken, mut events) = (0, 0, 0, 0);
    for seed in seeds.clone() {
        let outcome = run(sound(seed));
        assert!(
            outcome.found.is_empty(),
            "seed {seed} (again with SOPHONT_SIM_SEED={seed}): {:?}\n{}",
            outcome.found,
            outcome.details.join("\n")
        );
        commits += outcome.commits;
        faults += outcome.faults;
        events += outcome.events;
        taken += outcome.taken;
    }
    println!("{} histories: {events} events, {commits} commits, {faults} faults, {taken} shards taken", seeds.count());
    assert!(commits > 0 && faults > 0, "something happened");
}

/// The first seed at which a store without a check is caught, and at what.
fn caught(settings: impl Fn(u64) -> Settings) -> Option<(u64, BTreeSet<Wrong>)> {
    let outcomes = (0..CAUGHT_WITHIN).map(|seed| (seed, run(settings(seed)).found));
    outcomes.into_iter().find(|(_, found)| !found.is_empty())
}

#[test]
fn without_the_fence_two_epochs_commit() {
    let (seed, found) = caught(|seed| Settings { fence: false, ..sound(seed) }).expect("nobody noticed");
    println!("seed {seed}: {found:?}");
    assert!(found.contains(&Wrong::StaleCommit), "{found:?}");
}

#[test]
fn without_recognising_repeats_turns_double() {
    let (seed, found) = caught(|seed| Settings { dedupe: false, ..sound(seed) }).expect("nobody noticed");
    println!("seed {seed}: {found:?}");
    assert!(found.contains(&Wrong::Doubled), "{found:?}");
}

#[test]
fn without_looking_at_what_was_lodged_the_order_breaks() {
    let (seed, found) = caught(|seed| Settings { behind: false, ..sound(seed) }).expect("nobody noticed");
    println!("seed {seed}: {found:?}");
    assert!(found.contains(&Wrong::Order), "{found:?}");
}

#[test]
fn a_seed_is_a_whole_history() {
    for seed in 0..3 {
        let [one, other] = [run(sound(seed)), run(sound(seed))];
        assert_eq!((one.events, one.commits, one.taken), (other.events, other.commits, other.taken));
    }
}
