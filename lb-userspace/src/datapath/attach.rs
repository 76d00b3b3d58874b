//! Puts the programs onto their hooks and takes them off: the only file that
//! knows how aya attaches.
//!
//! What is attached stays when the agent goes. A start takes it over: the
//! program of a link or filter that is there is replaced in place, so that no
//! packet meets a hook without one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io, mem,
    path::Path,
};

use aya::{
    Ebpf,
    pin::PinError,
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, ProgramError, ProgramFd, SchedClassifier,
        TcAttachType, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
        },
    },
};
use lb_common::names;
use tracing::{debug, info, warn};

use super::{
    cgroup::Cgroup,
    clsact::{self, Owner},
    layouts,
    load::{LoadError, load_xdp},
    pins::{DeviceHook, LinkPin, Mark, Pins, ROLE_MARKS},
    sys::{self, Target},
};
use crate::{
    args::XdpChoice,
    devices::{Device, Role},
    errors::Chain,
    netlink::{Netlink, Side},
};

/// Why a program is not on its hook.
#[derive(Debug, thiserror::Error)]
#[error("putting {what} onto {on}")]
pub struct AttachError {
    what: &'static str,
    on: String,
    source: Cause,
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("the device has gone")]
    Gone,
    #[error("the program is not in the BPF object")]
    NoProgram,
    #[error("the driver offers no link for XDP")]
    NoLink,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Load(#[from] Box<LoadError>),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Tc(#[from] TcError),
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcMode {
    Tcx,
    Clsact,
}

/// The programs, and the hooks that they are on.
pub struct Hooks {
    ebpf: Ebpf,
    pins: Pins,
    netlink: Netlink,
    owner: Owner,
    tc: TcMode,
    xdp: XdpChoice,
    /// What this process has attached, by index of the device.
    attached: BTreeMap<u32, Role>,
    /// Of these, the devices whose driver runs XDP.
    native_xdp: BTreeSet<u32>,
    /// Pin folders of other layouts, whose programs are beside these.
    others: Vec<Pins>,
    /// Whether what is new is this layout's to serve. Before, XDP is left to the
    /// others: there is one program on a device.
    in_charge: bool,
    /// Devices whose XDP is another layout's for now.
    lent: BTreeSet<u32>,
}

impl Hooks {
    /// The maps must be pinned by now.
    pub fn new(ebpf: Ebpf, pins: Pins, tc: TcMode, xdp: XdpChoice) -> io::Result<Self> {
        let others = layouts::others(&pins)?;
        Ok(Self {
            in_charge: others.is_empty(),
            others,
            lent: BTreeSet::new(),
            ebpf,
            netlink: Netlink::open()?,
            owner: Owner::new(&pins),
            pins,
            tc,
            xdp,
            attached: BTreeMap::new(),
            native_xdp: BTreeSet::new(),
        })
    }

    /// Attaches every socket program to a control group. Links of an earlier
    /// run to the same group are taken over, those to another one replaced.
    pub fn attach_sockets(&mut self, path: &Path) -> Result<(), AttachError> {
        for name in names::SOCKET_PROGRAMS {
            self.attach_socket(name, path)
                .map_err(|source| AttachError {
                    what: name,
                    on: path.display().to_string(),
                    source,
                })?;
        }
        info!(cgroup = %path.display(), "attached to sockets");
        Ok(())
    }

    fn attach_socket(&mut self, name: &'static str, path: &Path) -> Result<(), Cause> {
        let pin = LinkPin::Socket(name);
        let cgroup = Cgroup::open(path)?;
        let program: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
        if take_over(&self.pins, pin, Target::Cgroup(cgroup.id), program.fd()?)? {
            return Ok(());
        }
        // A link always shares the hook with others; the flag for it is refused.
        let id = program.attach(&cgroup.folder, CgroupAttachMode::Single)?;
        let link = FdLink::try_from(program.take_link(id)?)?;
        pin_link(&self.pins, pin, link, Target::Cgroup(cgroup.id))
    }

    /// Makes the programs be on these devices, and on no others.
    ///
    /// Returns what failed; the next call tries it again.
    pub fn apply(&mut self, wanted: &BTreeMap<u32, Device>) -> Vec<AttachError> {
        self.detach_all_but(wanted);
        let mut errors = Vec::new();
        for (index, device) in wanted {
            if self.attached.get(index) == Some(&device.role) {
                continue;
            }
            match self.attach_device(*index, device) {
                Ok(xdp) => {
                    info!(device = device.name, role = %device.role, tc = self.tc.name(), xdp, "attached");
                    self.attached.insert(*index, device.role);
                    if xdp == mode_name(XdpMode::Driver) {
                        self.native_xdp.insert(*index);
                    } else {
                        self.native_xdp.remove(index);
                    }
                }
                Err(AttachError { source, .. }) if source.is_gone() => {
                    debug!(device = device.name, "gone before it was attached");
                }
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    /// Pin folders of other layouts.
    pub fn others(&self) -> &[Pins] {
        &self.others
    }

    /// Other layouts begin no flows any more: has the next [`Self::apply`] take
    /// over their XDP. What their XDP knew, their TC knows too.
    pub fn take_charge(&mut self) {
        self.in_charge = true;
        for index in mem::take(&mut self.lent) {
            self.attached.remove(&index);
        }
    }

    /// The devices whose driver runs XDP, by index.
    pub fn native_xdp(&self) -> &BTreeSet<u32> {
        &self.native_xdp
    }

    fn detach_all_but(&mut self, wanted: &BTreeMap<u32, Device>) {
        let known = match self.pins.devices() {
            Ok(known) => known,
            Err(error) => {
                warn!(%error, "cannot list what is attached");
                return;
            }
        };
        for index in known
            .into_iter()
            .filter(|index| !wanted.contains_key(index))
        {
            self.attached.remove(&index);
            self.native_xdp.remove(&index);
            match detach(&self.pins, &self.netlink, &self.owner, index) {
                Ok(()) => info!(
                    index,
                    "detached from a device that has gone or is no edge any more"
                ),
                Err(error) => warn!(index, %error, "detaching failed"),
            }
        }
    }

    /// Has the next [`Self::apply`] put back the filters that somebody else has
    /// removed: some CNIs delete the `clsact` qdisc of a device when they start.
    /// Nobody takes away a link so.
    pub fn forget_lost_filters(&mut self) {
        if self.tc != TcMode::Clsact {
            return;
        }
        let (netlink, handle) = (&self.netlink, clsact::handle(&self.pins));
        self.attached.retain(|index, _| {
            let present = has_filters(netlink, handle, *index).unwrap_or(true);
            if !present {
                info!(index, "somebody has removed the filters from this device");
            }
            present
        });
    }

    /// Returns how XDP is attached.
    ///
    /// Egress comes before ingress, so that no flow begins whose replies would
    /// pass untranslated.
    fn attach_device(&mut self, index: u32, device: &Device) -> Result<&'static str, AttachError> {
        let failed = |what| {
            move |source| AttachError {
                what,
                on: device.name.clone(),
                source,
            }
        };
        self.mark_role(index, device.role)
            .map_err(failed("a mark"))?;
        for side in [Side::Egress, Side::Ingress] {
            let name = side.hook().program();
            let attached = match self.tc {
                TcMode::Tcx => self.attach_tcx(side, index, &device.name),
                TcMode::Clsact => self.attach_clsact(side, index, &device.name),
            };
            attached.map_err(failed(name))?;
        }
        self.remove_other_tc(index)
            .map_err(failed(names::TC_INGRESS))?;
        let xdp = match device.role {
            Role::Uplink => self.attach_xdp(index, &device.name),
            Role::Overlay | Role::Pod => self.detach_xdp(index),
        };
        xdp.map_err(failed(names::XDP))
    }

    fn mark_role(&self, index: u32, role: Role) -> Result<(), Cause> {
        for (other, mark) in ROLE_MARKS {
            if other == role {
                self.pins.mark(index, mark)?;
            } else {
                self.pins.unmark(index, mark)?;
            }
        }
        Ok(())
    }

    fn attach_tcx(&mut self, side: Side, index: u32, device: &str) -> Result<(), Cause> {
        let hook = side.hook();
        let pin = LinkPin::Device(hook, index);
        let program: &mut SchedClassifier = program(&mut self.ebpf, hook.program())?;
        if take_over(&self.pins, pin, Target::Device(index), program.fd()?)? {
            return Ok(());
        }
        // For the order see `Side::priority`.
        let order = match side {
            Side::Ingress => LinkOrder::first(),
            Side::Egress => LinkOrder::last(),
        };
        let options = TcAttachOptions::TcxOrder(order);
        let id = program.attach_with_options(device, attach_type(side), options)?;
        let link = FdLink::try_from(program.take_link(id)?)?;
        pin_link(&self.pins, pin, link, Target::Device(index))
    }

    fn attach_clsact(&mut self, side: Side, index: u32, device: &str) -> Result<(), Cause> {
        // aya attaches by name, which may be another device's by now.
        if nix::net::if_::if_nametoindex(device).ok() != Some(index) {
            return Err(Cause::Gone);
        }
        self.add_clsact(index, device)?;
        let filters = self.netlink.filters(index, side)?;
        let program: &mut SchedClassifier = program(&mut self.ebpf, side.hook().program())?;
        let number = clsact::handle(&self.pins);
        let (priority, handle) = (side.priority(), TcHandle::from(number));
        let mut own = filters.iter().filter(|filter| filter.handle == number);
        let id = if own.any(|filter| clsact::is_klbs(side, filter)) {
            let old =
                SchedClassifierLink::attached(device, attach_type(side), priority, handle, None)?;
            program.attach_to_link(old)?
        } else {
            let options = TcAttachOptions::Netlink(NlOptions {
                priority,
                handle,
                classid: None,
            });
            program.attach_with_options(device, attach_type(side), options)?
        };
        // A filter stays by itself, and aya's object would remove it in the end.
        mem::forget(program.take_link(id)?);
        Ok(())
    }

    /// Puts the qdisc onto a device that has none. The mark comes first: with
    /// no qdisc it means nothing, while a qdisc without its mark would stay.
    ///
    /// The kernel stops the device's queues while it adds or removes this qdisc
    /// and loses what is on its way out. That happens once in the life of a
    /// device, and not when an agent starts again.
    fn add_clsact(&self, index: u32, device: &str) -> Result<(), Cause> {
        let new_mark = self.pins.mark(index, Mark::Clsact)?;
        match qdisc_add_clsact(device) {
            Ok(()) => Ok(()),
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
                if new_mark {
                    self.pins.unmark(index, Mark::Clsact)?;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what an earlier run attached in the other way. Until then both
    /// ran: what one has translated matches nothing at the other.
    fn remove_other_tc(&self, index: u32) -> Result<(), Cause> {
        match self.tc {
            TcMode::Tcx => {
                self.owner.remove(&self.netlink, &self.pins, index)?;
            }
            TcMode::Clsact => {
                self.pins
                    .remove_link(LinkPin::Device(DeviceHook::TcIngress, index))?;
                self.pins
                    .remove_link(LinkPin::Device(DeviceHook::TcEgress, index))?;
            }
        }
        Ok(())
    }

    fn attach_xdp(&mut self, index: u32, device: &str) -> Result<&'static str, Cause> {
        let modes: &[XdpMode] = match self.xdp {
            XdpChoice::Auto => &[XdpMode::Driver, XdpMode::Skb],
            XdpChoice::Native => &[XdpMode::Driver],
            XdpChoice::Generic => &[XdpMode::Skb],
            XdpChoice::Off => return self.detach_xdp(index),
        };
        if self.is_lent(index)? {
            return Ok("another layout's");
        }
        if let [first, ..] = modes
            && self.take_over_xdp(index, *first)?
        {
            return Ok(mode_name(*first));
        }
        let mut error = Cause::NoLink;
        for mode in modes {
            match self.attach_xdp_as(index, *mode) {
                Ok(()) => return Ok(mode_name(*mode)),
                Err(failure) => error = failure,
            }
        }
        if self.xdp == XdpChoice::Auto && !error.is_gone() {
            let error = Chain(&error);
            warn!(device, %error, "no XDP on this device; TC does its work");
            return Ok("off");
        }
        Err(error)
    }

    /// Whether XDP stays another layout's for now. Once this one is in charge, it
    /// gets the other's link, with the other's program until that is replaced.
    fn is_lent(&mut self, index: u32) -> Result<bool, Cause> {
        let pin = LinkPin::Device(DeviceHook::Xdp, index);
        for other in &self.others {
            let path = other.link(pin);
            if !path.exists() {
                continue;
            }
            if !self.in_charge {
                self.lent.insert(index);
                return Ok(true);
            }
            let link = PinnedLink::from_pin(&path)?.unpin()?;
            match pin_link(&self.pins, pin, link, Target::Device(index)) {
                // It was of a device that had the number before.
                Err(Cause::Gone) => {}
                result => result?,
            }
        }
        Ok(false)
    }

    /// Takes over a link of an earlier run if it is in the wanted mode. One in
    /// another mode is removed, since a device has one mode at a time; TC does
    /// its work meanwhile.
    fn take_over_xdp(&mut self, index: u32, mode: XdpMode) -> Result<bool, Cause> {
        let pin = LinkPin::Device(DeviceHook::Xdp, index);
        let links = self.netlink.links()?;
        let current = links
            .iter()
            .find(|link| link.index == index)
            .and_then(|link| link.xdp);
        if current.is_some_and(|xdp| xdp.native == matches!(mode, XdpMode::Driver)) {
            let program = xdp_program(&mut self.ebpf, mode)?;
            if take_over(&self.pins, pin, Target::Device(index), program.fd()?)? {
                return Ok(true);
            }
        }
        self.pins.remove_link(pin)?;
        Ok(false)
    }

    fn attach_xdp_as(&mut self, index: u32, mode: XdpMode) -> Result<(), Cause> {
        let program = xdp_program(&mut self.ebpf, mode)?;
        let id = program.attach_to_if_index(index, mode)?;
        let link = match FdLink::try_from(program.take_link(id)?) {
            // aya fell back to an attachment that ends with the agent.
            Err(LinkError::InvalidLink) => return Err(Cause::NoLink),
            link => link?,
        };
        let pin = LinkPin::Device(DeviceHook::Xdp, index);
        pin_link(&self.pins, pin, link, Target::Device(index))
    }

    fn detach_xdp(&self, index: u32) -> Result<&'static str, Cause> {
        self.pins
            .remove_link(LinkPin::Device(DeviceHook::Xdp, index))?;
        Ok("off")
    }
}

/// Whether the filters with this number are on both sides of a device.
fn has_filters(netlink: &Netlink, handle: u32, index: u32) -> io::Result<bool> {
    for side in Side::ALL {
        let filters = netlink.filters(index, side)?;
        let mut own = filters.iter().filter(|filter| filter.handle == handle);
        if !own.any(|filter| clsact::is_klbs(side, filter)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes everything of a pin folder off its hooks. Maps stay. Returns the
/// number of devices that there was something on.
pub fn detach_everything(pins: &Pins) -> io::Result<usize> {
    let netlink = Netlink::open()?;
    let owner = Owner::new(pins);
    let devices = pins.devices()?;
    for index in &devices {
        detach(pins, &netlink, &owner, *index)?;
    }
    detach_sockets(pins)?;
    Ok(devices.len())
}

/// Takes the socket programs off, of whichever run.
pub fn detach_sockets(pins: &Pins) -> io::Result<()> {
    let mut programs = names::SOCKET_PROGRAMS.into_iter();
    programs.try_for_each(|name| pins.remove_link(LinkPin::Socket(name)))
}

/// Takes all programs off a device, or forgets one that has gone. Ingress goes
/// before egress: see [`Hooks::attach_device`].
fn detach(pins: &Pins, netlink: &Netlink, owner: &Owner, index: u32) -> io::Result<()> {
    for hook in DeviceHook::ALL {
        pins.remove_link(LinkPin::Device(hook, index))?;
    }
    owner.remove(netlink, pins, index)?;
    pins.unmark_all(index)
}

impl Cause {
    /// Whether the device has gone meanwhile, of which netlink tells anyway.
    fn is_gone(&self) -> bool {
        let number = match self {
            Self::Gone => return true,
            Self::Io(error) | Self::Program(ProgramError::TcError(TcError::IoError(error))) => {
                error.raw_os_error()
            }
            Self::Program(ProgramError::SyscallError(error)) => error.io_error.raw_os_error(),
            Self::Program(ProgramError::TcError(TcError::NetlinkError(error)))
            | Self::Tc(TcError::NetlinkError(error)) => error.raw_os_error(),
            Self::Tc(TcError::IoError(error)) => error.raw_os_error(),
            _ => None,
        };
        matches!(number, Some(libc::ENODEV | libc::ENXIO))
    }
}

impl TcMode {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

const fn mode_name(mode: XdpMode) -> &'static str {
    match mode {
        XdpMode::Skb => "generic",
        _ => "native",
    }
}

const fn attach_type(side: Side) -> TcAttachType {
    match side {
        Side::Ingress => TcAttachType::Ingress,
        Side::Egress => TcAttachType::Egress,
    }
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut T, Cause>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or(Cause::NoProgram)?;
    Ok(program.try_into()?)
}

/// The form of the XDP program for a mode.
fn xdp_program(ebpf: &mut Ebpf, mode: XdpMode) -> Result<&mut Xdp, Cause> {
    let name = load_xdp(ebpf, matches!(mode, XdpMode::Driver)).map_err(Box::new)?;
    program(ebpf, name)
}

/// Replaces the program of a pinned link, if there is one and it is attached to
/// the target.
fn take_over(
    pins: &Pins,
    pin: LinkPin,
    target: Target,
    program: &ProgramFd,
) -> Result<bool, Cause> {
    let link = match sys::open_pin(&pins.link(pin)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        link => link?,
    };
    if sys::link_info(&link)?.target != target {
        return Ok(false);
    }
    match sys::update_link(&link, program) {
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        result => Ok(result.map(|()| true)?),
    }
}

/// Pins a new link, in place of another that may be pinned there. The old one
/// ends with its pin, at a moment when the new one runs already.
fn pin_link(pins: &Pins, pin: LinkPin, link: FdLink, target: Target) -> Result<(), Cause> {
    let (new, path) = (pins.new_link(pin), pins.link(pin));
    drop(link.pin(&new)?);
    // Where aya attaches by name, another device may have the name by now.
    if sys::link_info(sys::open_pin(&new)?)?.target != target {
        fs::remove_file(&new)?;
        return Err(Cause::Gone);
    }
    Ok(fs::rename(&new, &path)?)
}
