//! The threads on which calls run that leave the node, and how many run and wait at once.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::{Builder, Runtime},
    task::AbortHandle,
};

use crate::{
    config::tools::Tools,
    scaling::pool::{Limits, Places, Refused},
    telemetry::metric,
};

/// The executors of tools.
pub(super) struct Pool {
    runtime: Option<Runtime>,
    places: Arc<Places>,
}

/// Ends a task when whoever waits for it is gone.
struct Leash(AbortHandle);

impl Drop for Leash {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits are judged by how long a call may take.
pub(super) fn limits(settings: &Tools) -> Limits {
    Limits {
        size: settings.max_concurrent,
        overflow: 0,
        wait: Duration::from_secs(settings.call_seconds),
        recycle: Duration::MAX,
        waiting: settings.max_waiting,
    }
}

impl Pool {
    pub(super) fn new(settings: &Tools) -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(settings.threads)
            .thread_name("sophont-tools")
            .enable_all()
            .build()?;
        Ok(Self { runtime: Some(runtime), places: Places::new("tools", limits(settings)) })
    }

    /// How many run and wait at once.
    pub(super) const fn places(&self) -> &Arc<Places> {
        &self.places
    }

    /// Runs a call, waiting for a place included, within its deadline. Dropping the future ends the call.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        deadline: Duration,
        call: impl Future<Output = Result<T, String>> + Send + 'static,
    ) -> Result<T, String> {
        let late = || format!("no result within {deadline:?}");
        tokio::time::timeout(deadline, self.run_some_time(call)).await.unwrap_or_else(|_| Err(late()))
    }

    async fn run_some_time<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, String>> + Send + 'static,
    ) -> Result<T, String> {
        let ended = || String::from("the node is shutting down");
        let place = self.places.take().await.map_err(|refused| match refused {
            Refused::Full => String::from("too many tool calls wait; try again later"),
            Refused::Late => String::from("no tool call ended in time; try again later"),
            Refused::Closed => ended(),
        })?;
        let Some(runtime) = &self.runtime else { return Err(ended()) };
        let running = metrics::gauge!(metric::TOOL_RUNNING);
        running.increment(1.0);
        let task = runtime.spawn(call);
        let leash = Leash(task.abort_handle());
        let end = task.await;
        running.decrement(1.0);
        drop((leash, place));
        end.unwrap_or_else(|error| Err(if error.is_panic() { String::from("the tool crashed") } else { ended() }))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn pool(at_once: usize, waiting: usize) -> Pool {
        let mut settings = Config::default().tools;
        (settings.max_concurrent, settings.max_waiting, settings.threads) = (at_once, waiting, 1);
        Pool::new(&settings).unwrap()
    }

    #[tokio::test]
    async fn calls_are_counted_waited_for_and_refused() {
        let pool = pool(1, 1);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let first = pool.run(Duration::from_secs(60), async move { wait.await.map_err(|e| e.to_string()) });
        tokio::pin!(first);
        assert!(futures_util::poll!(&mut first).is_pending());
        let second = pool.run(Duration::from_secs(60), async { Ok(2) });
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        let third = pool.run(Duration::from_secs(60), async { Ok(3) }).await;
        assert_eq!(third, Err(String::from("too many tool calls wait; try again later")));
        go.send(()).unwrap();
        assert_eq!((first.await, second.await), (Ok(()), Ok(2)));
    }

    #[tokio::test]
    async fn a_call_ends_with_its_deadline_its_caller_or_its_panic() {
        struct Told(Arc<tokio::sync::Notify>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let pool = pool(2, 0);
        let ended = Arc::new(tokio::sync::Notify::new());
        let told = Told(ended.clone());
        let endless = async move {
            let _told = told;
            std::future::pending::<Result<(), String>>().await
        };
        assert!(pool.run(Duration::from_millis(20), endless).await.unwrap_err().starts_with("no result within"));
        ended.notified().await;
        let crash = pool.run(Duration::from_secs(60), async { if true { panic!("on purpose") } else { Ok(()) } });
        assert_eq!(crash.await, Err(String::from("the tool crashed")));
    }
}
