//! `blockmirror measure`.

use blockmirror_image::{Format, Measurement};

use crate::args::{MeasureArgs, Output};
use crate::console::Console;
use crate::create::parse_options;
use crate::failure::{Exit, Failure, Outcome};
use crate::{json, lock_policy};

pub(crate) fn run(console: &mut Console<'_>, args: &MeasureArgs) -> Outcome {
    let format = args.target_format.unwrap_or(Format::Raw);
    let Some(settings) = parse_options(console, format, &args.target_options)? else { return Ok(Exit::Done) };
    // Options that do not fit together are a matter of the command line.
    let of_size = |size| {
        Measurement::of_size(size, format, &settings).map_err(|error| Failure::from(error).exit(Exit::Usage))
    };
    let measured = match (&args.file, args.size) {
        (None, Some(_))
            if args.source_format.is_some() || args.snapshot.is_some() || args.access.image_opts =>
        {
            let why = "measure: -f, -l and --image-opts are about an image, and none is named";
            return Err(Failure::usage(why).in_qemu("--image-opts, -f, and -l require a filename argument."));
        }
        (None, Some(size)) => of_size(size)?,
        (Some(file), None) => {
            of_size(0)?;
            let image = lock_policy::of_source(&args.access)
                .format(args.source_format)
                .node(args.node.clone())
                .snapshot(args.snapshot.clone())
                .policy(lock_policy::policy(file, &args.access)?)
                .open(file)?;
            for note in image.notes() {
                console.note(note);
            }
            // A signal ends this command at once, so nothing is asked meanwhile.
            Measurement::of_image(&image, format, &settings)?
        }
        _ => return Err(Failure::usage("measure: name an image, or give a size with --size")),
    };
    console.print(&match args.output.output {
        Output::Json => json::pretty(&measured.to_json()) + "\n",
        Output::Human => human(&measured),
    })?;
    Ok(Exit::Done)
}

fn human(measured: &Measurement) -> String {
    let mut out =
        format!("required size: {}\nfully allocated size: {}\n", measured.required, measured.fully_allocated);
    if let Some(bitmaps) = measured.bitmaps {
        out.push_str(&format!("bitmaps size: {bitmaps}\n"));
    }
    out
}
