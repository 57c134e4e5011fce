//! A watch channel like `tokio::sync::watch`, whose waiters wake in the order in which they began to wait. Tokio wakes waiters in
//! random order, which would make runs of the simulation tests unrepeatable.

use std::fmt;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::lock::lock;

/// The writing side of the channel. Clones share one value.
pub(crate) struct Sender<T>(Arc<WatchShared<T>>);

/// The waiting side of the channel.
pub(crate) struct Receiver<T> {
    shared: Arc<WatchShared<T>>,
    /// The last version that this receiver has seen.
    seen: u64,
}

/// The error of a wait after the last sender was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed;

struct WatchShared<T> {
    slot: Mutex<Versioned<T>>,
    changed: Notify,
    senders: AtomicUsize,
}

struct Versioned<T> {
    value: T,
    version: u64,
}

/// A reference to the value, which stays locked until the reference is dropped.
pub(crate) struct Ref<'a, T>(MutexGuard<'a, Versioned<T>>);

impl<T> Deref for Ref<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

pub(crate) fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
    let sender = Sender::new(value);
    let receiver = sender.subscribe();
    (sender, receiver)
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.changed.notify_waiters();
        }
    }
}

impl<T: Default> Default for Sender<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sender").field(&*self.borrow()).finish()
    }
}

impl<T: fmt::Debug> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receiver").field(&lock(&self.shared.slot).value).finish()
    }
}

impl<T> Sender<T> {
    pub(crate) fn new(value: T) -> Self {
        let (slot, changed) = (Mutex::new(Versioned { value, version: 0 }), Notify::new());
        Self(Arc::new(WatchShared { slot, changed, senders: AtomicUsize::new(1) }))
    }

    pub(crate) fn borrow(&self) -> Ref<'_, T> {
        Ref(lock(&self.0.slot))
    }

    pub(crate) fn send_modify(&self, modify: impl FnOnce(&mut T)) {
        self.send_if_modified(|value| {
            modify(value);
            true
        });
    }

    pub(crate) fn send_replace(&self, value: T) {
        self.send_modify(|slot| *slot = value);
    }

    /// Calls `modify` with the value, wakes the waiters if `modify` returns true, and returns the result of `modify`.
    pub(crate) fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
        let mut slot = lock(&self.0.slot);
        let is_modified = modify(&mut slot.value);
        if is_modified {
            slot.version += 1;
            drop(slot);
            self.0.changed.notify_waiters();
        }
        is_modified
    }

    /// Returns a receiver that has seen the current value.
    pub(crate) fn subscribe(&self) -> Receiver<T> {
        Receiver { shared: Arc::clone(&self.0), seen: lock(&self.0.slot).version }
    }
}

impl<T> Receiver<T> {
    /// Returns the value, and marks it as seen.
    pub(crate) fn borrow_and_update(&mut self) -> Ref<'_, T> {
        let slot = lock(&self.shared.slot);
        self.seen = slot.version;
        Ref(slot)
    }

    /// Waits until there is a value that this receiver has not seen.
    ///
    /// # Errors
    /// When this receiver has seen the current value, and the last sender is dropped.
    pub(crate) async fn changed(&mut self) -> Result<(), Closed> {
        let seen = self.seen;
        self.until(|slot| slot.version != seen).await
    }

    /// Waits until the value meets a condition.
    ///
    /// # Errors
    /// When the value does not meet the condition, and the last sender is dropped.
    pub(crate) async fn wait_for(&mut self, mut is_met: impl FnMut(&T) -> bool) -> Result<(), Closed> {
        self.until(|slot| is_met(&slot.value)).await
    }

    async fn until(&mut self, mut is_over: impl FnMut(&Versioned<T>) -> bool) -> Result<(), Closed> {
        loop {
            // Register for notifications before reading the value, so that a change between the read and the wait is not missed.
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            let is_closed = self.shared.senders.load(Ordering::Acquire) == 0;
            {
                let slot = lock(&self.shared.slot);
                self.seen = slot.version;
                if is_over(&slot) {
                    return Ok(());
                }
            }
            if is_closed {
                return Err(Closed);
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiters_wake_in_the_order_in_which_they_began_to_wait() {
        let (sender, woken) = (Sender::new(false), Arc::new(Mutex::new(Vec::new())));
        let waiters: Vec<_> = (0..50)
            .map(|number| {
                let (mut receiver, woken) = (sender.subscribe(), Arc::clone(&woken));
                tokio::spawn(async move {
                    let _ = receiver.wait_for(|is_set| *is_set).await;
                    woken.lock().unwrap().push(number);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        sender.send_replace(true);
        for waiter in waiters {
            waiter.await.unwrap();
        }
        assert_eq!(*woken.lock().unwrap(), (0..50).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_change_between_two_waits_is_not_missed() {
        let sender = Sender::new(1);
        let mut receiver = sender.subscribe();
        sender.send_replace(2);
        let _ = receiver.changed().await;
        assert_eq!(*receiver.borrow_and_update(), 2);
        assert!(!sender.send_if_modified(|_| false));
        let mut again = pin!(receiver.changed());
        assert!(futures_util::FutureExt::now_or_never(again.as_mut()).is_none());
        sender.send_modify(|value| *value += 1);
        let _ = again.await;
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_last_sender_and_not_before() {
        let (sender, mut receiver) = channel(1);
        let other = sender.clone();
        drop(sender);
        let waiting = tokio::spawn(async move { receiver.changed().await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        other.send_replace(2);
        waiting.await.unwrap().unwrap();
        let mut receiver = other.subscribe();
        let waiting = tokio::spawn(async move { receiver.wait_for(|value| *value == 3).await });
        tokio::task::yield_now().await;
        drop(other);
        assert_eq!(waiting.await.unwrap(), Err(Closed));
    }
}
