//! A fixed-capacity pool of values addressed by index. Nothing is allocated after it was made, and memory that was never
//! used is never touched.

use alloc::vec::Vec;

/// Not an index: the end of a list, or nothing.
pub const NONE: u32 = u32::MAX;

/// Memory that is filled from its front as more is needed, as addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    /// What comes first of what was never used.
    pub from: usize,
    /// The end of what there is.
    pub end: usize,
}

impl Frontier {
    /// Of `values`, of which the first `used` were used.
    pub(crate) fn of<T>(values: &Vec<T>, used: usize) -> Frontier {
        let start = values.as_ptr() as usize;
        Frontier { from: start + used * size_of::<T>(), end: start + values.capacity() * size_of::<T>() }
    }
}

/// Values of `T` by index; freed places are used again, last freed first (they are still in the cache).
#[derive(Debug)]
pub struct Slab<T> {
    values: Vec<T>,
    free: Vec<u32>,
    capacity: usize,
}

impl<T> Slab<T> {
    /// Room for `capacity` values.
    pub fn new(capacity: usize) -> Slab<T> {
        assert!(capacity < NONE as usize, "indices are 32 bits");
        Slab { values: Vec::with_capacity(capacity), free: Vec::with_capacity(capacity), capacity }
    }

    /// Values in use.
    pub(crate) fn len(&self) -> usize {
        self.values.len() - self.free.len()
    }

    /// Whether all places are taken.
    pub fn is_full(&self) -> bool {
        self.len() == self.capacity
    }

    /// One past the highest index that was ever in use.
    pub fn high_water(&self) -> u32 {
        self.values.len() as u32
    }

    /// How far it is filled.
    pub(crate) fn frontier(&self) -> Frontier {
        Frontier::of(&self.values, self.values.len())
    }

    /// A place for `value`, or `None` when all are taken.
    pub fn insert(&mut self, value: T) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            self.values[index as usize] = value;
            return Some(index);
        }
        if self.values.len() == self.capacity {
            return None;
        }
        self.values.push(value);
        Some(self.values.len() as u32 - 1)
    }

    /// Gives the place back. The caller holds no other copy of `index`.
    pub fn remove(&mut self, index: u32) {
        self.free.push(index);
    }
}

impl<T> core::ops::Index<u32> for Slab<T> {
    type Output = T;
    #[inline]
    fn index(&self, index: u32) -> &T {
        &self.values[index as usize]
    }
}

impl<T> core::ops::IndexMut<u32> for Slab<T> {
    #[inline]
    fn index_mut(&mut self, index: u32) -> &mut T {
        &mut self.values[index as usize]
    }
}

/// Values of `T` for the places of a [`Slab`], kept apart from what lies there: memory of a place that was never used is not touched either.
#[derive(Debug)]
pub(crate) struct Column<T>(Vec<T>);

impl<T> Column<T> {
    /// Room for `capacity` values.
    pub(crate) fn new(capacity: usize) -> Column<T> {
        Column(Vec::with_capacity(capacity))
    }

    /// How far it is filled.
    pub(crate) fn frontier(&self) -> Frontier {
        Frontier::of(&self.0, self.0.len())
    }

    /// Sets the value of a place of the slab, which was in use before or is the first that was not.
    pub(crate) fn set(&mut self, index: u32, value: T) {
        if index as usize == self.0.len() {
            self.0.push(value);
        } else {
            self.0[index as usize] = value;
        }
    }
}

impl<T> core::ops::Index<u32> for Column<T> {
    type Output = T;
    #[inline]
    fn index(&self, index: u32) -> &T {
        &self.0[index as usize]
    }
}

impl<T> core::ops::IndexMut<u32> for Column<T> {
    #[inline]
    fn index_mut(&mut self, index: u32) -> &mut T {
        &mut self.0[index as usize]
    }
}
