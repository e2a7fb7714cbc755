//! SUBSCRIBE and UNSUBSCRIBE of one connection.
//!
//! Invariants: a granted subscription of a lasting session is durable before SUBACK; retained values follow the SUBACK.
//! Not here: rights (`inbound`), routes (`registry`). Tests: `tests/it/mqtt.rs`.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    connection::Connection,
    embedded::count_dropped,
    inbound,
    packet::{Broken, Id, Wish, code},
    record::{self, Message, Subscription},
    topic::{Filter, literal_prefix, matches},
};
use crate::types::limits::{MAX_RETAINED, MAX_SUBSCRIPTIONS};

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Takes a SUBSCRIBE.
    pub(super) async fn subscribe(&mut self, id: Id, sub: Option<u32>, wishes: Vec<Wish>) -> Result<(), Broken> {
        let mut codes = Vec::with_capacity(wishes.len());
        // Filters whose retained values are due, and those that were not there before.
        let (mut due, mut new) = (Vec::new(), Vec::new());
        for wish in &wishes {
            let granted = self.grant(wish)?;
            codes.push(granted);
            if granted > 2 {
                continue;
            }
            let subscription = Subscription {
                filter: wish.filter.clone(),
                qos: wish.qos,
                no_local: wish.no_local,
                retain_as_published: wish.retain_as_published,
                id: sub,
            };
            self.space.subscribe(&self.session, &subscription);
            let is_new = self.session.lock().subscriptions.insert(wish.filter.clone(), subscription).is_none();
            if is_new {
                new.push(&wish.filter);
            }
            let is_shared = wish.filter.starts_with("$share/");
            if !is_shared && (wish.retain_handling == 0 || (wish.retain_handling == 1 && is_new)) {
                due.push((&wish.filter, wish.qos));
            }
        }
        if !self.write_session().await {
            for filter in new {
                self.space.unsubscribe(&self.session, filter);
                self.session.lock().subscriptions.remove(filter);
            }
            codes.iter_mut().filter(|granted| **granted <= 2).for_each(|granted| *granted = code::UNSPECIFIED);
            due.clear();
        }
        if let Some(roam) = &self.broker.roam {
            roam.told().await;
        }
        let mut found = Vec::with_capacity(due.len());
        for (filter, qos) in due {
            found.push((self.retained(filter).await?, qos));
        }
        self.codec.suback(id, &codes, &mut self.wire.output);
        for (values, qos) in found {
            if self.replay.len() + values.len() > MAX_RETAINED {
                count_dropped("too_many_retained", values.len() as u64);
                continue;
            }
            self.replay.extend(values.into_iter().map(|message| {
                let qos = qos.min(message.qos);
                (message, qos, sub)
            }));
        }
        Ok(())
    }

    /// Retained values a filter selects. Several nodes share what the store has; one alone has it in memory.
    async fn retained(&mut self, filter: &str) -> Result<Vec<Arc<Message>>, Broken> {
        let now = self.broker.clock.now();
        let Some(roam) = &self.broker.roam else { return Ok(self.space.retained().select(filter, now)) };
        let read = async {
            let rows = roam.sessions().retained(&self.space.tenant, literal_prefix(filter)).await.ok()?;
            rows.iter().map(|row| record::decode::<Message>(row).ok()).collect::<Option<Vec<_>>>()
        };
        let Some(values) = read.await else {
            // The client subscribes again on its next connection.
            return Err(Broken::new(code::UNAVAILABLE, "retained values cannot be read"));
        };
        let is_meant = |value: &Message| matches(filter, &value.topic) && !value.is_expired(now);
        Ok(values.into_iter().filter(is_meant).map(Arc::new).collect())
    }

    /// The answer to one filter: the QoS, or why not.
    fn grant(&self, wish: &Wish) -> Result<u8, Broken> {
        let Some(filter) = Filter::parse(&wish.filter) else { return Ok(code::FILTER_INVALID) };
        if filter.share.is_some() && wish.no_local {
            return Err(Broken::new(code::PROTOCOL_ERROR, "no local on a shared subscription"));
        }
        if let Err(refusal) = inbound::may_subscribe(&self.auth, filter.path, self.broker.config.plain_topics) {
            return Ok(refusal.reason.code());
        }
        let state = self.session.lock();
        let is_full = state.subscriptions.len() >= MAX_SUBSCRIPTIONS && !state.subscriptions.contains_key(&wish.filter);
        Ok(if is_full { code::QUOTA } else { wish.qos })
    }

    /// Takes an UNSUBSCRIBE.
    pub(super) async fn unsubscribe(&mut self, id: Id, filters: &[String]) {
        let mut codes = Vec::with_capacity(filters.len());
        for filter in filters {
            let was_there = self.session.lock().subscriptions.remove(filter).is_some();
            self.space.unsubscribe(&self.session, filter);
            codes.push(match (was_there, Filter::parse(filter)) {
                (true, _) => code::SUCCESS,
                (false, Some(_)) => code::NO_SUBSCRIPTION,
                (false, None) => code::FILTER_INVALID,
            });
        }
        // A row that still has the subscription would bring it back after a crash: the client is told it failed.
        if !self.write_session().await {
            codes.iter_mut().for_each(|answer| *answer = code::UNSPECIFIED);
        }
        if let Some(roam) = self.broker.roam.as_ref().filter(|_| self.is_persistent) {
            roam.changed();
        }
        self.codec.unsuback(id, &codes, &mut self.wire.output);
    }

    async fn write_session(&mut self) -> bool {
        if !self.is_persistent {
            return true;
        }
        let put = self.session.put(&self.session.lock());
        match put {
            Ok(put) => self.broker.write(vec![put]).await,
            Err(_) => false,
        }
    }
}
