"""Small videos that players show otherwise than their frames are stored, made with the real ffmpeg.

Each shows four coloured quarters, red, lime, blue and yellow as read, and their negatives in every other second.
"""

import subprocess

from casa_serving.caption.burn import find_ffmpeg

SECONDS = 4
QUARTERS = [f"color={name}:s=80x60:d={SECONDS}:r=10" for name in ("red", "lime", "blue", "yellow")]
PICTURE = (
    "".join(f"{source}[{letter}];" for source, letter in zip(QUARTERS, "abcd", strict=True))
    + "[a][b]hstack[e];[c][d]hstack[f];[e][f]vstack,negate=enable='gte(mod(t,2),1)'"
)
# What is done to the plain video, in ffmpeg's words; {v} is the video, {a} a sound of 8 s, {h} the mirrored video.
UNTAGGED = "h264_metadata=matrix_coefficients=2:colour_primaries=2:transfer_characteristics=2"
BOTH = "-map 0:v -map 1:a -c copy"
HALF_RED = "color=red@0.5:s=160x120:d=2:r=10,format=yuva420p"
RECIPES = {
    "plain.mp4": "-i {v} -c copy",
    "late.mp4": f"-itsoffset 3 -i {{v}} -i {{a}} {BOTH}",
    "late.mkv": f"-itsoffset 3 -i {{v}} -i {{a}} {BOTH}",
    "late_alone.mp4": "-itsoffset 3 -i {v} -c copy",
    "late_alone.mkv": "-itsoffset 1.5 -i {v} -c copy",
    "late_both.mp4": f"-i {{v}} -i {{a}} {BOTH} -output_ts_offset 2",
    "late_sound.mp4": f"-i {{v}} -itsoffset 3 -i {{a}} {BOTH}",
    "early.mp4": f"-itsoffset -0.3 -i {{v}} -i {{a}} {BOTH}",
    "edit_list.mp4": "-ss 1.5 -i {v} -c copy",
    "fragments.mp4": "-i {v} -c copy -movflags frag_keyframe+empty_moov+default_base_moof",
    "long_sound.mp4": f"-i {{v}} -i {{a}} {BOTH}",
    "hflip.mp4": "-display_hflip -i {v} -c copy",
    "vflip.mp4": "-display_vflip -i {v} -c copy",
    **{f"turn{turn}.mp4": f"-display_rotation {turn} -i {{v}} -c copy" for turn in (90, 180, 270)},
    **{f"turn{turn}_hflip.mp4": f"-display_rotation {turn} -display_hflip -i {{v}} -c copy" for turn in (90, 180, 270)},
    "wide_pixels.mp4": "-i {v} -vf setsar=2 -c:v libx264",
    "high_pixels.mp4": "-i {v} -vf setsar=1/2 -c:v libx264",
    "odd_sides.mp4": "-i {v} -vf crop=159:119 -c:v libx264 -pix_fmt yuv444p",
    "full_range.mp4": "-i {v} -vf scale=out_range=pc -c:v libx264 -pix_fmt yuvj420p",
    "hd_untagged.mp4": "-i {v} -vf scale=960:720:out_color_matrix=bt709:flags=neighbor -c:v libx264 -bsf:v " + UNTAGGED,
    "grey.mp4": "-i {v} -c:v libx264 -pix_fmt gray",
    "ten_bits.webm": "-i {v} -c:v libvpx-vp9 -pix_fmt yuv420p10le",
    "interlaced.mp4": "-i {v} -c:v libx264 -flags +ilme+ildct -vf interlace",
    "uneven.mp4": "-i {v} -vf select='not(between(n,5,25))' -fps_mode vfr -c:v libx264",
    "one_frame.mp4": "-i {v} -frames:v 1 -c:v libx264",
    "two.mp4": "-i {v} -i {h} -map 0:v -map 1:v -c copy",
    "two_second_chosen.mp4": "-i {v} -i {h} -map 0:v -map 1:v -c copy -disposition:v:0 0 -disposition:v:1 default",
    "two_second_chosen.mkv": "-i {v} -i {h} -map 0:v -map 1:v -c copy -disposition:v:0 0 -disposition:v:1 default",
    "cover_first.mp4": "-i {v} -i {j} -map 1 -map 0 -c:v copy -disposition:v:0 attached_pic",
    "see_through.webm": f"-f lavfi -i {HALF_RED} -c:v libvpx-vp9",
    "see_through_vp8.webm": f"-f lavfi -i {HALF_RED} -c:v libvpx -auto-alt-ref 0",
}


def ffmpeg(*words):
    """Run ffmpeg, which must succeed."""
    subprocess.run([find_ffmpeg(), "-loglevel", "error", "-y", *map(str, words)], check=True)


class OddVideos:
    """Makes them in a folder.

    Args:
        folder: Where to.
    """

    def __init__(self, folder):
        self._folder = folder
        self._parts = {name[0]: folder / name for name in ("v.mp4", "a.m4a", "h.mp4", "j.jpg")}
        parts = self._parts
        ffmpeg("-f", "lavfi", "-i", PICTURE, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 10, parts["v"])
        ffmpeg("-f", "lavfi", "-i", "sine=d=8", "-c:a", "aac", parts["a"])
        ffmpeg("-display_hflip", "-i", parts["v"], "-c", "copy", parts["h"])
        ffmpeg("-i", parts["v"], "-frames:v", 1, parts["j"])

    def make(self, name, recipe=None):
        """Return a video by its name in `RECIPES`, or by words of its own."""
        words = (recipe or RECIPES[name]).split()
        ffmpeg(*(word.format(**self._parts) for word in words), self._folder / name)
        return self._folder / name
