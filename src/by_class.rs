//! Entries that name classes, class by class.

/// The entries of a list of classes that name each class, in their order.
pub(crate) struct ByClass {
    entries: Vec<usize>,
    /// Where the entries of a class begin, and their end.
    starts: Vec<usize>,
}

impl ByClass {
    /// Each of the classes is below `vocab`.
    pub fn new(classes: &[u32], vocab: usize) -> Self {
        let mut starts = vec![0; vocab + 1];
        for class in classes {
            starts[*class as usize + 1] += 1;
        }
        for class in 0..vocab {
            starts[class + 1] += starts[class];
        }
        let mut next = starts.clone();
        let mut entries = vec![0; classes.len()];
        for (entry, class) in classes.iter().enumerate() {
            let next = &mut next[*class as usize];
            entries[*next] = entry;
            *next += 1;
        }
        Self { entries, starts }
    }

    pub fn entries(&self, class: usize) -> &[usize] {
        &self.entries[self.starts[class]..self.starts[class + 1]]
    }
}
