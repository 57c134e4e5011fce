//! [`Places`]: a number of places that are taken and given back, and that a reload may change.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The places of one thing; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    semaphore: Arc<Semaphore>,
    size: Arc<Mutex<Size>>,
}

#[derive(Debug)]
struct Size {
    capacity: usize,
    /// The places that are to disappear once they are given back.
    surplus: usize,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    permit: Option<OwnedSemaphorePermit>,
    size: Arc<Mutex<Size>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut size = lock(&self.size);
        if let Some(permit) = self.permit.take()
            && size.surplus > 0
        {
            size.surplus -= 1;
            permit.forget();
        }
    }
}

fn lock(size: &Mutex<Size>) -> MutexGuard<'_, Size> {
    size.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Places {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            semaphore: Arc::new(Semaphore::new(capacity)),
            size: Arc::new(Mutex::new(Size { capacity, surplus: 0 })),
        }
    }

    /// The number of places.
    pub(crate) fn capacity(&self) -> usize {
        lock(&self.size).capacity
    }

    /// Waits for a place.
    pub(crate) async fn take(&self) -> Place {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.semaphore).acquire_owned().await.ok();
        Place { permit, size: Arc::clone(&self.size) }
    }

    /// Changes the number of places. Those that are taken stay so, and are fewer once they are given back.
    pub(crate) fn resize(&self, capacity: usize) {
        let mut size = lock(&self.size);
        if capacity > size.capacity {
            let more = capacity - size.capacity;
            let kept = more.min(size.surplus);
            size.surplus -= kept;
            self.semaphore.add_permits(more - kept);
        } else {
            let fewer = size.capacity - capacity;
            size.surplus += fewer - self.semaphore.forget_permits(fewer);
        }
        size.capacity = capacity;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn take_all(places: &Places) -> Vec<Place> {
        std::iter::from_fn(|| places.take().now_or_never()).collect()
    }

    #[test]
    fn more_places_are_there_at_once() {
        let places = Places::new(2);
        let taken = take_all(&places);
        places.resize(5);
        assert_eq!((taken.len(), take_all(&places).len()), (2, 3));
    }

    #[test]
    fn fewer_places_are_left_once_the_taken_ones_are_back() {
        let places = Places::new(5);
        let taken = take_all(&places);
        places.resize(2);
        assert_eq!(take_all(&places).len(), 0);
        drop(taken);
        assert_eq!(take_all(&places).len(), 2);
    }

    #[test]
    fn places_that_were_to_disappear_may_be_needed_again() {
        let places = Places::new(4);
        let taken = take_all(&places);
        places.resize(1);
        places.resize(6);
        assert_eq!(take_all(&places).len(), 2);
        drop(taken);
        assert_eq!(take_all(&places).len(), 6);
    }
}
