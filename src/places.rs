//! [`Places`]: a semaphore whose size a reload can change.

use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;

use crate::lock::lock;

/// A counting semaphore with `capacity` places. Clones share the places.
#[derive(Debug, Clone)]
pub(crate) struct Places(Arc<PlacesShared>);

#[derive(Debug)]
struct PlacesShared {
    free: Semaphore,
    size: Mutex<Size>,
}

#[derive(Debug)]
struct Size {
    capacity: usize,
    /// The number of taken places beyond a reduced `capacity`. As places are released, this many are discarded instead of freed.
    surplus: usize,
}

/// An occupied place. Dropping the value frees the place.
#[derive(Debug)]
pub(crate) struct Place(Places);

impl Drop for Place {
    fn drop(&mut self) {
        let PlacesShared { free, size } = &*self.0.0;
        let mut size = lock(size);
        if size.surplus > 0 {
            size.surplus -= 1;
        } else {
            free.add_permits(1);
        }
    }
}

impl Places {
    pub(crate) fn new(capacity: usize) -> Self {
        Self(Arc::new(PlacesShared { free: Semaphore::new(capacity), size: Mutex::new(Size { capacity, surplus: 0 }) }))
    }

    pub(crate) fn capacity(&self) -> usize {
        lock(&self.0.size).capacity
    }

    pub(crate) async fn take(&self) -> Place {
        // The result is always `Ok`, because the semaphore is never closed. The permit is given back when the `Place` is dropped.
        if let Ok(permit) = self.0.free.acquire().await {
            permit.forget();
        }
        Place(self.clone())
    }

    /// Changes the number of places. Places beyond a smaller `capacity` stay taken until they are released.
    pub(crate) fn resize(&self, capacity: usize) {
        let mut size = lock(&self.0.size);
        if capacity > size.capacity {
            let more = capacity - size.capacity;
            let kept = more.min(size.surplus);
            size.surplus -= kept;
            self.0.free.add_permits(more - kept);
        } else {
            let fewer = size.capacity - capacity;
            size.surplus += fewer - self.0.free.forget_permits(fewer);
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
    fn surplus_places_disappear_when_they_are_released() {
        let places = Places::new(5);
        let taken = take_all(&places);
        places.resize(2);
        assert_eq!(take_all(&places).len(), 0);
        drop(taken);
        assert_eq!(take_all(&places).len(), 2);
    }

    #[test]
    fn growing_keeps_places_that_were_to_disappear() {
        let places = Places::new(4);
        let taken = take_all(&places);
        places.resize(1);
        places.resize(6);
        assert_eq!(take_all(&places).len(), 2);
        drop(taken);
        assert_eq!(take_all(&places).len(), 6);
    }
}
