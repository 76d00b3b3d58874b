//! The way of the packet through the hooks: each program run, one after the
//! other, on what the one before has left.

use lb_common::{Hook, Reason, reason::Effect};
use serde::Serialize;

use super::frame;
use crate::{
    datapath::{
        inspect::DeviceHooks,
        trial::{Action, Ends, Trial, TrialError},
    },
    netlink::{Netlink, Route, Transit},
};

/// What one hook did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Step {
    pub(super) hook: &'static str,
    /// `null` at a socket.
    pub(super) device: Option<String>,
    /// The program was run, or what it would do was found without.
    pub(super) run: bool,
    pub(super) reason: &'static str,
    pub(super) description: &'static str,
    /// `pass`, `translate`, `refuse`, `keep` or `answer`.
    pub(super) effect: &'static str,
    /// `on`, `back`, `elsewhere` or `dropped`.
    pub(super) way: &'static str,
    /// The packet as it leaves the hook; `null` if it ends there or is answered.
    pub(super) becomes: Option<Ends>,
}

/// How a reason's effect is called.
pub(super) const fn effect_name(effect: Effect) -> &'static str {
    match effect {
        Effect::Pass => "pass",
        Effect::Translate => "translate",
        Effect::Refuse => "refuse",
        Effect::Keep => "keep",
        Effect::Answer => "answer",
    }
}

const fn way_name(action: Action) -> &'static str {
    match action {
        Action::GoOn => "on",
        Action::Drop => "dropped",
        Action::Back => "back",
        Action::Redirect => "elsewhere",
    }
}

/// Where a packet leaves the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Nobody was asked: the packet does not go on, or is not klb's.
    Unasked,
    Here,
    Nowhere,
    /// By a device, with its name.
    By(u32, String),
    /// Where a program has sent it.
    Sent,
}

/// The whole way.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) steps: Vec<Step>,
    /// Why what happened to the packet did, where it came in.
    pub(super) reason: Reason,
    /// As it leaves the hooks where it comes in.
    pub(super) came: Option<Ends>,
    pub(super) exit: Exit,
    /// As it leaves the node.
    pub(super) left: Option<Ends>,
    /// The device by which it leaves has no program, and the packet needs one.
    pub(super) egress_missing: bool,
    pub(super) notes: Vec<String>,
}

/// What is needed to walk.
pub(super) struct Ground<'a> {
    pub(super) trial: &'a mut Trial,
    pub(super) netlink: &'a Netlink,
    pub(super) devices: &'a [DeviceHooks],
    /// Where the packet comes in.
    pub(super) place: &'a DeviceHooks,
    /// The living flow that it is of has its packets masqueraded.
    pub(super) is_masqueraded: bool,
}

impl Ground<'_> {
    /// Walks with a packet.
    pub(super) fn walk(&mut self, ends: Ends, frame: &[u8]) -> Result<Walk, TrialError> {
        let mut walk = Walk {
            steps: Vec::new(),
            reason: Reason::NotService,
            came: Some(ends),
            exit: Exit::Unasked,
            left: None,
            egress_missing: false,
            notes: Vec::new(),
        };
        let mut frame = frame.to_vec();
        let mut action = Action::GoOn;
        let mut is_translated = false;
        for (hook, is_there) in [
            (Hook::Xdp, self.place.xdp.is_some()),
            (Hook::TcIngress, self.place.tc_ingress.is_some()),
        ] {
            if !is_there || action != Action::GoOn {
                continue;
            }
            let run = match self.trial.run(hook, self.place.index, &frame) {
                Err(error @ TrialError::NoXdp) => {
                    walk.notes.push(format!("XDP was left out: {error}"));
                    continue;
                }
                run => run?,
            };
            action = run.action;
            frame = run.frame;
            walk.note(hook, self.place, run.reason, action, &frame);
            if !is_translated {
                walk.reason = run.reason;
            } else if run.reason.effect() == Effect::Pass {
                walk.leave_as_it_is();
            }
            is_translated |= run.reason.effect() == Effect::Translate;
        }
        walk.came = walk.steps.last().map_or(Some(ends), |step| step.becomes);
        walk.left = walk.came;
        if is_translated && let Some(came) = walk.came {
            self.leave(&mut walk, ends, came, &frame, action)?;
        }
        Ok(walk)
    }

    /// Out of the device that the route leads to.
    fn leave(
        &mut self,
        walk: &mut Walk,
        ends: Ends,
        came: Ends,
        frame: &[u8],
        action: Action,
    ) -> Result<(), TrialError> {
        let is_masqueraded = self.is_masqueraded || walk.reason == Reason::NewMasqueradedFlow;
        // Past the stack it may have been masqueraded already.
        let is_done = came.src.ip() != ends.src.ip();
        if action == Action::Back || action == Action::Redirect && (is_done || !is_masqueraded) {
            walk.exit = Exit::Sent;
            return Ok(());
        }
        walk.exit = self.exit(came);
        let Exit::By(index, name) = &walk.exit else {
            return Ok(());
        };
        let device = self.devices.iter().find(|device| device.index == *index);
        let Some(device) = device.filter(|device| device.tc_egress.is_some()) else {
            walk.egress_missing = is_masqueraded && !is_done;
            if walk.egress_missing {
                let note = format!("klb is not on {name}, by which the packet leaves");
                walk.notes.push(note);
            }
            return Ok(());
        };
        let run = self.trial.run(Hook::TcEgress, *index, frame)?;
        let says_something = run.reason != Reason::NotService;
        if says_something || is_masqueraded {
            walk.left = frame::ends(&run.frame);
            walk.note(Hook::TcEgress, device, run.reason, run.action, &run.frame);
        }
        Ok(())
    }

    fn exit(&self, came: Ends) -> Exit {
        let transit = Transit {
            from: came.src.ip(),
            device: self.place.index,
        };
        let to = came.dst.ip();
        // The kernel does not say so of a source that would not come in there.
        let route = self.netlink.route(to, Some(transit));
        let route = route.or_else(|_refused| self.netlink.route(to, None));
        match route {
            Ok(Route::Here) => Exit::Here,
            Ok(Route::By(index)) => Exit::By(index, self.name(index)),
            Ok(Route::Nowhere) | Err(_) => Exit::Nowhere,
        }
    }

    fn name(&self, index: u32) -> String {
        let links = self.netlink.links().unwrap_or_default();
        let link = links.into_iter().find(|link| link.index == index);
        link.map_or_else(|| format!("device {index}"), |link| link.name)
    }
}

impl Walk {
    /// What XDP has translated is none of TC's business any more, and looks like
    /// anything to it.
    fn leave_as_it_is(&mut self) {
        if let Some(step) = self.steps.last_mut() {
            step.description = "Translated by XDP already.";
        }
    }

    fn note(
        &mut self,
        hook: Hook,
        device: &DeviceHooks,
        reason: Reason,
        action: Action,
        frame: &[u8],
    ) {
        let ends_here = action == Action::Drop || reason.effect() == Effect::Answer;
        self.steps.push(Step {
            hook: hook.name(),
            device: device.name.clone(),
            run: true,
            reason: reason.name(),
            description: reason.description().trim_start(),
            effect: effect_name(reason.effect()),
            way: way_name(action),
            becomes: if ends_here { None } else { frame::ends(frame) },
        });
    }
}
