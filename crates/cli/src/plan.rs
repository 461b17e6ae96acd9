//! What a dry run prints: `mirror --dry-run`, `convert --dry-run` and `plan`.
//!
//! The figures are those of [`CheckedConvert::plan`]; here they become text, JSON or a picture. `plan` prints
//! more text than the others, because it is read by people; JSON and pictures are the same.

use std::fmt::Write as _;
use std::time::Duration;

use blockmirror_block::size::human_size;
use blockmirror_mirror::{GranularityCost, Plan, SMALL_WRITE};
use blockmirror_ops::{CheckedConvert, Space};
use blockmirror_picture::{CopyPlan, Format, GranularityRow, SpaceRow};
use serde_json::{Value, json};

use crate::args::{CopyArgs, View};
use crate::console::with_names;
use crate::failure::{Failure, Outcome, one_line};
use crate::json;
use crate::report::member;

/// What is known of a copy that is not made.
pub(crate) struct Planned<'a> {
    args: &'a CopyArgs,
    plan: Plan,
    costs: Vec<GranularityCost>,
    space: Option<Space>,
    /// How long it takes at the speed that was given.
    time: Option<Duration>,
}

impl<'a> Planned<'a> {
    pub(crate) fn new(args: &'a CopyArgs, checked: &CheckedConvert, plan: Plan) -> Self {
        let time = (args.speed > 0).then(|| Duration::from_secs_f64(plan.copy as f64 / args.speed as f64));
        Self { args, costs: plan.costs().collect(), space: checked.planned_space(&plan), time, plan }
    }

    /// All of it, as it was asked for. What is drawn is escaped: it has the names that `names` show.
    pub(crate) fn text(&self, names: &[(String, String)]) -> Outcome<String> {
        match self.args.output.output {
            View::Human => Ok(self.human()),
            View::Json => self.json(),
            View::Svg => Ok(self.picture(names, Format::Svg)),
            View::Html => Ok(self.picture(names, Format::Html)),
        }
    }

    fn human(&self) -> String {
        let (source, target) = (self.args.shown_sources(), self.args.target.to_string_lossy());
        let word = if self.args.plans { "plan" } else { "dry run" };
        let heading = one_line(&format!("{word}: {source} -> {target}: {}", human_size(self.plan.len)));
        let mut out = format!("{heading}\n{}\n", self.plan);
        if self.args.plans {
            self.details(&mut out);
        }
        out
    }

    /// What `plan` says besides. Writing to a text does not fail.
    fn details(&self, out: &mut String) {
        let unit = if self.plan.cluster_size.is_some() { "clusters" } else { "blocks of 4 KiB" };
        let _ = writeln!(out, "allocated in {unit}: {}", human_size(self.plan.allocation()));
        if let Some(space) = self.space {
            let (needed, free) = (human_size(space.needed), human_size(space.free));
            let verdict = match (space.fits(), space.guess) {
                (true, _) => String::new(),
                (false, Some(why)) => format!("; it may not fit ({why})"),
                (false, None) => "; it does not fit".to_owned(),
            };
            let _ = writeln!(out, "space: up to {needed} needed, {free} free{verdict}");
        }
        if let Some(time) = self.time {
            let seconds = time.as_secs_f64();
            let _ = writeln!(out, "time: {seconds:.1} s at {}/s", human_size(self.args.speed));
        }
        let _ =
            writeln!(out, "\n  granularity      memory    4K write   whole granules: 4K write   allocated");
        for cost in &self.costs {
            let _ = writeln!(
                out,
                "{} {:>11} {:>11} {:>11} {:>26} {:>11}",
                if cost.chosen { '>' } else { ' ' },
                human_size(cost.granularity),
                human_size(cost.memory),
                human_size(cost.write),
                human_size(cost.whole_write),
                human_size(cost.whole_allocation),
            );
        }
        out.push_str(
            "\nmemory: of the dirty bitmaps, at most; 4K write: bytes copied after such a write of the guest.\n\
             whole granules: what a mirror does that copies them whole, as QEMU's.\n",
        );
    }

    fn json(&self) -> Outcome<String> {
        let (name, value) = member(self.args);
        let mut out = json!({ (name): value, "target": self.args.target.to_string_lossy() });
        let plan = serde_json::to_value(self.plan).map_err(Failure::failed)?;
        let costs = serde_json::to_value(&self.costs).map_err(Failure::failed)?;
        if let (Value::Object(out), Value::Object(plan)) = (&mut out, plan) {
            out.extend(plan);
        }
        out["allocation"] = json!(self.plan.allocation());
        if let Some(space) = self.space {
            out["space"] = json!({ "needed": space.needed, "free": space.free });
            if let Some(why) = space.guess.filter(|_| !space.fits()) {
                out["space"]["guess"] = json!(why);
            }
        }
        if let Some(time) = self.time {
            out["time"] = json!({ "speed": self.args.speed, "seconds": time.as_secs_f64() });
        }
        out["small-write"] = json!(SMALL_WRITE);
        out["granularities"] = costs;
        Ok(json::pretty(&out) + "\n")
    }

    fn picture(&self, names: &[(String, String)], format: Format) -> String {
        let source = self.args.shown_sources();
        let target = self.args.target.to_string_lossy();
        let row = |cost: &GranularityCost| GranularityRow {
            granularity: cost.granularity,
            memory: cost.memory,
            write: cost.write,
            whole_write: cost.whole_write,
            whole_allocation: cost.whole_allocation,
            chosen: cost.chosen,
        };
        let rows: Vec<_> = self.costs.iter().map(row).collect();
        let plan = &self.plan;
        let space = self.space.map(|Space { needed, free, guess, .. }| SpaceRow { needed, free, guess });
        CopyPlan {
            source: &with_names(names, &source, false),
            target: &with_names(names, &target, false),
            len: plan.len,
            copy: plan.copy,
            zero: plan.zero,
            skip: plan.skip,
            allocation: plan.allocation(),
            granularity: &plan.granularity.to_string(),
            small_write: SMALL_WRITE,
            rows: &rows,
            space,
            time: self.time.map(|time| (self.args.speed, time)),
        }
        .picture(format)
    }
}
