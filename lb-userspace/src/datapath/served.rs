//! The ports at which anything is served (`klb_served`), for the agent, which writes
//! them.

use lb_common::{Port, Served, names};

use super::{MapError, kernel::Table, load::LoadError, pins::Pins};

pub(super) struct ServedPorts {
    table: Table<Served>,
    /// As they were found or written last, and what is to be written.
    wanted: Box<Served>,
    is_written: bool,
}

impl ServedPorts {
    pub(super) fn open(pins: &Pins) -> Result<Self, LoadError> {
        let table = Table::open(pins, names::SERVED)?;
        let wanted = Box::new(table.get(0)?);
        Ok(Self {
            table,
            wanted,
            is_written: true,
        })
    }

    /// Adds a port, which [`Self::write`] is to write.
    pub(super) fn add(&mut self, port: Port) {
        if self.wanted.add(port) {
            self.is_written = false;
        }
    }

    pub(super) fn write(&mut self) -> Result<(), MapError> {
        if !self.is_written {
            self.table.put(0, *self.wanted)?;
            self.is_written = true;
        }
        Ok(())
    }

    /// Makes them what they were; whether somebody else had changed them.
    pub(super) fn mend(&mut self) -> Result<bool, MapError> {
        self.is_written = self.table.get(0)? == *self.wanted;
        let is_strange = !self.is_written;
        self.write().map(|()| is_strange)
    }
}
