//! Tests of `shelf` and `prune`.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    memory::{
        Forget, Known, Prune,
        ask::{self, Asked},
        cells, lexical,
    },
    store::rank,
    types::{
        Channel, EpisodeId, Outcome, RawJson, Source, StateChange, Stimulus,
        id::stable_hash,
        memory::{ENGINE, Extra, FORGET_CHANNEL, Forgetting, Vector, WRITE_CHANNEL, Writing, Written, read_writing},
    },
};

fn record(turn: u64, channel: &str, data: RawJson, at: i64) -> TurnRecord {
    let mut stimulus = Stimulus::empty(Source::Http, Channel::new(channel).unwrap(), Millis(at));
    stimulus.data = Some(data);
    TurnRecord {
        turn,
        version: 0,
        stimulus,
        outcome: Outcome::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::None,
        episodes: Vec::new(),
        steps: 0,
        engine: String::from(ENGINE),
        model: None,
        usage: None,
        error: None,
        decided_at: Millis(at),
        epoch: 0,
    }
}

fn episode(content: &str) -> Written {
    let extra = Extra::default();
    Written { content: content.into(), data: None, tags: Vec::new(), reward: None, occurred_at: None, extra }
}

fn writing(turn: u64, at: i64, episodes: Vec<Written>) -> TurnRecord {
    let data = RawJson::from_serialize(&Writing { episodes }).unwrap();
    let mut record = record(turn, WRITE_CHANNEL, data, at);
    let (drafts, kept) = read_writing(&record.stimulus).unwrap();
    record.episodes = drafts;
    record.stimulus.data = kept;
    record
}

fn forgetting(turn: u64, at: i64, ids: &[EpisodeId]) -> TurnRecord {
    record(turn, FORGET_CHANNEL, RawJson::from_serialize(&Forgetting::of(ids)).unwrap(), at)
}

fn id(turn: u64, place: usize) -> EpisodeId {
    EpisodeId::new(turn, place)
}

fn asked(text: &str, known: Known) -> Asked {
    Asked {
        words: rank::query_words(&ask::meaning(text).join(" ")),
        lexical: lexical::embed(text),
        given: None,
        ours: false,
        limit: 10,
        known,
        now: Millis(1_000_000),
    }
}

fn found(shelf: &Shelf, text: &str, known: Known) -> Vec<EpisodeId> {
    shelf.search(&asked(text, known)).unwrap().0.iter().map(|hit| hit.id).collect()
}

fn shelf(turns: &[TurnRecord]) -> Shelf {
    let mut shelf = Shelf::new(1, true, 1000);
    for turn in turns {
        shelf.follow(turn);
    }
    shelf
}

#[test]
fn filters_are_exact() {
    let of = |content: &str, tags: &[&str], reward, at| Written {
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        reward,
        occurred_at: Some(at),
        ..episode(content)
    };
    let mut many: Vec<Written> = (0..300).map(|n| of(&format!("the lamp number {n}"), &["x"], None, n)).collect();
    many.push(of("lamp lamp lamp far down", &["a", "b"], Some(0.9), 5000));
    many.push(of("a lamp too, of sorts and of many more words than are good for it", &["a"], Some(0.1), 6000));
    let shelf = shelf(&[writing(1, 10, many)]);
    let known = Known::default;
    let tags = |tags: &[&str]| tags.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
    assert_eq!(found(&shelf, "lamp", known()).len(), 10);
    let both = [id(1, 300), id(1, 301)];
    assert_eq!(found(&shelf, "lamp", Known { tags_any: tags(&["a", "none"]), ..known() }), both);
    assert_eq!(found(&shelf, "lamp", Known { tags_all: tags(&["a", "b"]), ..known() }), both[..1]);
    assert!(found(&shelf, "lamp", Known { tags_all: tags(&["a", "none"]), ..known() }).is_empty());
    assert!(found(&shelf, "lamp", Known { tags_any: tags(&["none"]), ..known() }).is_empty());
    assert_eq!(found(&shelf, "lamp", Known { min_reward: Some(0.5), ..known() }), both[..1]);
    assert_eq!(found(&shelf, "lamp", Known { after: Some(Millis(6000)), ..known() }), both[1..]);
    assert_eq!(found(&shelf, "lamp", Known { before: Some(Millis(1)), ..known() }), [id(1, 0)]);
}

#[test]
fn what_was_known_at_a_time_is_told_exactly() {
    let rome = Extra { supersedes: vec![id(1, 0)], ..Extra::default() };
    let mut shelf = shelf(&[
        writing(1, 10, vec![episode("Ann lives in Paris")]),
        writing(2, 20, vec![Written { extra: rome, ..episode("Ann lives in Rome") }]),
        writing(3, 30, vec![episode("Ann lives alone")]),
    ]);
    let at = |time| Known { as_of: Some(Millis(time)), ..Known::default() };
    let who = "where does Ann live?";
    let mut now = found(&shelf, who, Known::default());
    now.sort_unstable();
    assert_eq!(now, [id(2, 0), id(3, 0)], "Paris holds no longer");
    assert!(found(&shelf, who, at(9)).is_empty());
    assert_eq!(found(&shelf, who, at(10)), [id(1, 0)]);
    assert_eq!(found(&shelf, who, at(19)), [id(1, 0)]);
    assert_eq!(found(&shelf, who, at(20)), [id(2, 0)]);
    assert_eq!(shelf.superseded_at(id(1, 0)), Some(Millis(20)));
    shelf.follow(&forgetting(4, 40, &[id(2, 0)]));
    assert_eq!(
        found(&shelf, who, Known::default()),
        [id(3, 0)],
        "what superseded it is gone, and Paris holds no more for that"
    );
    assert_eq!(found(&shelf, who, at(35)), [id(3, 0)], "its content is gone for every question");
    let forgotten = |time| shelf.search(&asked(who, at(time))).unwrap().1;
    assert_eq!([forgotten(19), forgotten(20), forgotten(39), forgotten(40)], [0, 1, 1, 0]);
}

#[test]
fn a_shelf_is_the_same_however_it_was_read() {
    let first = writing(1, 10, vec![episode("red apples"), episode("green pears")]);
    let gone = forgetting(2, 20, &[id(1, 0)]);
    let live = shelf(&[first.clone(), gone.clone()]);
    let mut redacted = first;
    assert!(redacted.redact(&[0]));
    let late = shelf(&[redacted, gone]);
    for shelf in [&live, &late] {
        assert!(found(shelf, "red apples", Known::default()).is_empty());
        assert_eq!(found(shelf, "green pears", Known::default()), [id(1, 1)]);
        let at = Known { as_of: Some(Millis(15)), ..Known::default() };
        assert_eq!(shelf.search(&asked("red apples", at)).unwrap().1, 1);
        assert!(!shelf.words.contains_key(&stable_hash("apples".bytes())), "no trace of its words");
    }
    let figures = |shelf: &Shelf| {
        let figures = shelf.figures();
        (figures.episodes, figures.forgotten, figures.newest)
    };
    assert_eq!(figures(&live), figures(&late));
    assert_eq!(figures(&live), (1, 1, Some(Millis(10))));
}

#[test]
fn duplicates_are_linked_and_shown_once() {
    let mut shelf = Shelf::new(1, true, 1000);
    let kinds = shelf.follow(&writing(
        1,
        10,
        vec![
            episode("The boiler failed at noon today."),
            episode("the BOILER failed at noon today"),
            episode("The garden hose leaks"),
            episode("ok"),
        ],
    ));
    assert_eq!(kinds, [Kind::Fresh, Kind::Duplicate, Kind::Fresh, Kind::Junk]);
    shelf.follow(&writing(2, 20, vec![episode("The boiler failed at noon today!")]));
    let (hits, _) = shelf.search(&asked("boiler", Known::default())).unwrap();
    assert_eq!(hits.len(), 1);
    assert_eq!(hits[0].duplicates, 2);
    assert_eq!(shelf.duplicate_of(id(2, 0)), Some(id(1, 0)));
    assert_eq!(shelf.duplicate_of(id(1, 0)), None);
    let figures = shelf.figures();
    assert_eq!((figures.episodes, figures.duplicates, figures.junk), (5, 2, 1));
    shelf.follow(&forgetting(3, 30, &[id(1, 0)]));
    assert_eq!(shelf.duplicate_of(id(2, 0)), Some(id(1, 1)), "the group gathers around the next");
    assert_eq!(shelf.search(&asked("boiler", Known::default())).unwrap().0[0].duplicates, 1);
}

#[test]
fn what_has_no_words_is_told_apart_by_its_data() {
    let of = |data: &str| Written { data: Some(RawJson::parse(data).unwrap()), ..episode("") };
    let shelf = shelf(&[writing(1, 10, vec![of("1"), of("2"), of("1")])]);
    let roots: Vec<_> = (0..3).map(|place| shelf.duplicate_of(id(1, place))).collect();
    assert_eq!(roots, [None, None, Some(id(1, 0))]);
}

#[test]
fn vectors_of_clients_find_what_words_do_not() {
    let with = |content: &str, numbers: &[f32]| Written {
        extra: Extra { embedding: Vector::of(numbers), ..Extra::default() },
        ..episode(content)
    };
    let shelf = shelf(&[writing(
        1,
        10,
        vec![
            with("a feline on the sofa", &[1.0, 0.1, 0.0]),
            with("quarterly figures", &[0.0, 0.1, 1.0]),
            episode("without a vector"),
        ],
    )]);
    assert_eq!(shelf.dimension(), Some(3));
    let ask = Asked { given: Vector::of(&[0.9, 0.0, 0.1]), ..asked("cat", Known::default()) };
    let (hits, _) = shelf.search(&ask).unwrap();
    assert_eq!(hits[0].id, id(1, 0));
    assert!(hits[0].explained.vector.is_some_and(|ranked| ranked.rank == 1 && ranked.score > 0.9));
    assert_eq!(hits[0].explained.words, None);
    let other = Asked { given: Vector::of(&[1.0, 0.0]), ..asked("cat", Known::default()) };
    assert_eq!(shelf.search(&other).unwrap_err(), OtherDimension { has: 3, given: 2 });
}

#[test]
fn what_goes_when_less_shall_stay() {
    let of = |content: &str, reward, at, tag: &str| Written {
        reward,
        occurred_at: Some(at),
        tags: vec![tag.into()],
        ..episode(content)
    };
    let mut shelf = shelf(&[writing(
        1,
        10,
        vec![
            of("one", Some(0.9), 100, "x"),
            of("two", None, 200, "y"),
            of("three", Some(-0.5), 300, "x"),
            of("four", None, 50, "z"),
        ],
    )]);
    let ids = |places: &[usize]| places.iter().map(|place| id(1, *place)).collect::<Vec<_>>();
    assert_eq!(Prune::OlderThan(Millis(200)).picks(&shelf), ids(&[0, 3]));
    assert_eq!(Prune::KeepNewest(1).picks(&shelf), ids(&[0, 1, 3]));
    assert_eq!(Prune::KeepBest(2).picks(&shelf), ids(&[2, 3]), "no reward counts as 0, of equals the newer stays");
    assert!(Prune::KeepBest(9).picks(&shelf).is_empty());
    let forget = Forget { ids: ids(&[1, 7]), tags: vec!["z".into()], text: None };
    assert_eq!(forget.picks(&shelf), ids(&[1, 3]));
    shelf.follow(&forgetting(2, 20, &ids(&[1, 3])));
    assert_eq!(Prune::KeepNewest(1).picks(&shelf), ids(&[0]), "what is gone does not count");
}

#[test]
fn a_line_of_an_import_is_known_again() {
    let line = Extra { line: Some("l-1".into()), ..Extra::default() };
    let mut shelf = shelf(&[writing(1, 10, vec![episode("a"), Written { extra: line, ..episode("b") }])]);
    assert_eq!(shelf.imported("l-1"), Some(id(1, 1)));
    assert_eq!(shelf.imported("l-2"), None);
    shelf.follow(&forgetting(2, 20, &[id(1, 1)]));
    assert_eq!(shelf.imported("l-1"), Some(id(1, 1)), "sending it again does not bring it back");
}

#[test]
fn a_line_that_two_imports_took_is_one_episode() {
    let line = || Extra { line: Some("l-1".into()), ..Extra::default() };
    let of = |content: &str| Written { extra: line(), tags: vec!["x".into()], ..episode(content) };
    let mut shelf = shelf(&[
        writing(1, 10, vec![of("the red bicycle is in the shed")]),
        writing(2, 20, vec![of("the red bicycle is in the shed"), episode("the blue bicycle is gone")]),
    ]);
    assert_eq!(shelf.imported("l-1"), Some(id(1, 0)));
    let (hits, _) = shelf.search(&asked("red bicycle", Known::default())).unwrap();
    assert_eq!(hits.iter().map(|hit| (hit.id, hit.duplicates)).collect::<Vec<_>>(), [(id(1, 0), 0), (id(2, 1), 0)]);
    let figures = shelf.figures();
    assert_eq!((figures.episodes, figures.duplicates, figures.forgotten), (2, 0, 0));
    assert_eq!(shelf.bare(9), [id(2, 1), id(1, 0)], "nobody embeds a repeat");
    assert_eq!(Prune::KeepNewest(2).picks(&shelf), [id(2, 0)], "it is the first to go");
    let tagged = Forget { tags: vec!["x".into()], ..Forget::default() };
    assert_eq!(tagged.picks(&shelf), [id(1, 0), id(2, 0)], "and goes with its tag");
    assert_eq!(shelf.with_vectors(vec![id(1, 0)]), [id(1, 0), id(2, 0)], "and with the first one");
    shelf.follow(&forgetting(3, 30, &[id(1, 0), id(2, 0)]));
    assert_eq!(found(&shelf, "red bicycle", Known::default()), [id(2, 1)]);
    assert_eq!(shelf.figures().episodes, 1);
}

#[test]
fn what_is_recalled_is_as_it_was_remembered() {
    let of = |content: &str, data: Option<&str>| Written {
        data: data.map(|data| RawJson::parse(data).unwrap()),
        tags: vec!["b".into(), "a".into()],
        reward: Some(0.5),
        occurred_at: Some(7),
        ..episode(content)
    };
    let long = "word ".repeat(1000);
    let turn =
        writing(1, 10, vec![of("käse", Some(r#"{"a":[1]}"#)), of("", Some("null")), of("tea", None), of(&long, None)]);
    let mut shelf = shelf(std::slice::from_ref(&turn));
    let told: Vec<_> = crate::store::replay::episodes(&turn).collect();
    assert_eq!((0..3).map(|slot| shelf.episode(slot).unwrap()).collect::<Vec<_>>(), told[..3]);
    assert_eq!(shelf.episode(3), None, "long ones stay in the log");
    shelf.follow(&forgetting(2, 20, &[id(1, 0), id(1, 2)]));
    assert_eq!((shelf.episode(0), shelf.episode(2)), (None, None));
    assert!(shelf.episode(1).is_some());
}

#[test]
fn the_index_is_kept_when_it_is_new_and_when_something_was_forgotten() {
    let new = || Shelf::new(1, true, 50);
    let many = |turn: u64, count: usize| {
        writing(turn, 10, (0..count).map(|n| episode(&format!("lamp {} of room {turn}", n * n))).collect())
    };
    let turns = [many(1, 80), many(2, 5), forgetting(3, 20, &[id(1, 0)]), many(4, 60)];
    let mut shelf = new();
    let mut to = |turn: &TurnRecord| {
        shelf.follow(turn);
        shelf.settle();
        let unkept = shelf.is_unkept();
        let plan = shelf.plans().map(|plans| (plans, found(&shelf, "lamp 81", Known::default())));
        shelf.kept = Some(turn.turn);
        assert!(!shelf.is_unkept() && shelf.plans().is_none());
        assert_eq!(unkept, plan.is_some());
        plan
    };
    let first = to(&turns[0]);
    assert!(first.is_some(), "it is new");
    assert!(to(&turns[1]).is_none(), "so few stand behind it");
    let third = to(&turns[2]);
    assert!(to(&turns[3]).is_some(), "so many do not");
    for (upto, kept) in [(1, first.unwrap()), (3, third.unwrap())] {
        let (plans, told) = kept;
        let places = &plans.lexical.as_ref().unwrap().places;
        assert_eq!(places[0] == cells::NOWHERE, upto == 3, "what is forgotten is in no cell");
        assert!(plans.given.is_none());
        let mut cold = new();
        cold.begin(plans, upto);
        turns[..usize::try_from(upto).unwrap()].iter().for_each(|turn| drop(cold.follow(turn)));
        cold.settle();
        assert!(!cold.is_unkept(), "as it is in the store");
        assert_eq!(found(&cold, "lamp 81", Known::default()), told);
        cold.follow(&turns[2]);
        assert_eq!(cold.is_unkept(), upto == 1, "the store has none since");
    }
}
