//! Whole memories out and in: what an export tells, and which lines of an import are there already.
//!
//! Not here: lines (`gateway::http::memory::transfer`). Tests: `tests/it/memory.rs`.

use std::collections::HashMap;

use super::{Error, Memory, PAGE};
use crate::{
    store::{Episode, replay},
    types::{EpisodeId, InstanceKey, Millis, memory::Extra},
};

/// An episode as it is exported.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// It.
    pub episode: Episode,
    /// What it carries beside.
    pub extra: Extra,
}

impl Memory {
    /// Of the lines of an import the episodes that came from them already.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn imported(&self, key: &InstanceKey, lines: &[String]) -> Result<Vec<Option<EpisodeId>>, Error> {
        match self.current(key).await {
            Err(Error::NotFound) => Ok(vec![None; lines.len()]),
            shelf => {
                let shelf = shelf?;
                let shelf = shelf.read().await;
                Ok(lines.iter().map(|line| shelf.imported(line)).collect())
            }
        }
    }

    /// When these episodes were recorded, also of those that were forgotten since; nothing of those there never were.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn recorded_at(&self, key: &InstanceKey, ids: &[EpisodeId]) -> Result<Vec<Option<Millis>>, Error> {
        match self.current(key).await {
            Err(Error::NotFound) => Ok(vec![None; ids.len()]),
            shelf => {
                let shelf = shelf?;
                let shelf = shelf.read().await;
                Ok(ids.iter().map(|id| shelf.recorded_at(*id)).collect())
            }
        }
    }

    /// Some episodes behind a turn, oldest first, and the turn to go on from; no turn when these were the last.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn export(&self, key: &InstanceKey, after: u64) -> Result<(Vec<Exported>, Option<u64>), Error> {
        let page = self.store.remembered(key, after, PAGE).await?;
        let mut found = Vec::new();
        for turn in &page.turns {
            let mut extras = turn.extras();
            for episode in replay::episodes(turn) {
                let extra = extras.get_mut(EpisodeId(episode.id).place()).map(std::mem::take).unwrap_or_default();
                found.push(Exported { episode, extra });
            }
        }
        let lines: Vec<String> = found.iter().filter_map(|exported| exported.extra.line.clone()).collect();
        if !lines.is_empty() {
            // Of imports side by side that took the same line one is an episode.
            let known = self.imported(key, &lines).await?;
            let known: HashMap<&String, EpisodeId> =
                lines.iter().zip(known).filter_map(|(line, id)| Some((line, id?))).collect();
            found.retain(|exported| {
                let first = exported.extra.line.as_ref().and_then(|line| known.get(line));
                first.is_none_or(|first| first.0 == exported.episode.id)
            });
        }
        Ok((found, page.turns.last().map(|turn| turn.turn)))
    }
}
