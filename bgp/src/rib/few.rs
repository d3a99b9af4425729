//! A list that is nearly always empty or of one element, and then needs no memory of its own.

use std::slice;

/// A list.
#[derive(Debug, Clone)]
pub(super) enum Few<T> {
    None,
    One(T),
    /// Two or more; the order is that of insertion unless somebody swaps.
    Many(Vec<T>),
}

impl<T> Few<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            Self::None => &[],
            Self::One(one) => slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        match self {
            Self::None => &mut [],
            Self::One(one) => slice::from_mut(one),
            Self::Many(many) => many,
        }
    }

    /// Puts an element at a place not behind the end.
    pub(super) fn insert(&mut self, at: usize, element: T) {
        *self = match std::mem::replace(self, Self::None) {
            Self::None => Self::One(element),
            Self::One(one) => {
                let mut many = Vec::with_capacity(2);
                many.push(one);
                many.insert(at, element);
                Self::Many(many)
            }
            Self::Many(mut many) => {
                many.insert(at, element);
                Self::Many(many)
            }
        };
    }

    pub(super) fn push(&mut self, element: T) {
        self.insert(self.as_slice().len(), element);
    }

    /// Keeps the elements for which `keep` holds.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        *self = match std::mem::replace(self, Self::None) {
            Self::One(one) if keep(&one) => Self::One(one),
            Self::None | Self::One(_) => Self::None,
            Self::Many(mut many) => {
                many.retain(keep);
                match many.len() {
                    0 | 1 => many.pop().map_or(Self::None, Self::One),
                    length => {
                        if many.capacity() > length * 4 {
                            many.shrink_to(length * 2);
                        }
                        Self::Many(many)
                    }
                }
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_shrinks_through_its_shapes() {
        let mut few = Few::None;
        few.push(2);
        assert!(matches!(few, Few::One(2)));
        few.insert(0, 1);
        few.push(4);
        few.insert(2, 3);
        assert_eq!(few.as_slice(), [1, 2, 3, 4]);
        few.retain(|element| element % 2 == 0);
        assert_eq!(few.as_mut_slice(), [2, 4]);
        few.retain(|element| *element == 4);
        assert!(matches!(few, Few::One(4)));
        few.retain(|_| false);
        assert!(matches!(few, Few::None) && few.as_slice().is_empty());
    }
}
